"""The network of 1989: its size, its arithmetic compared with PyTorch's layers, its data, and the command."""

import gzip
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from nanoghost.errors import UserError
from nanoghost.lab import lecun1989
from nanoghost.lab.lecun1989_digits import bundled_digits, folds, mnist_digits, resize
from nanoghost.lab.lecun1989_network import DigitRecipe, Networks, error_rates, shift, train


def test_the_network_has_as_many_weights_as_in_the_paper():
    assert Networks(1, DigitRecipe(), [0]).parameter_count() == 9760


@pytest.mark.parametrize("relu", [False, True])
def test_stacked_networks_compute_what_each_would_alone(relu):
    networks = Networks(3, DigitRecipe(relu=relu, maps=6), [5, 6, 7])
    for bias in (p for name, p in networks.parameters.items() if name.endswith("bias")):
        torch.nn.init.uniform_(bias.data, -1, 1)
    x = torch.rand(3, 4, 16, 16) * 2 - 1
    activation = torch.relu if relu else torch.tanh
    for i, logits in enumerate(networks.forward(x)):
        p = {name: stacked[i] for name, stacked in networks.parameters.items()}
        h = activation(F.conv2d(F.pad(x[i][:, None], (2,) * 4, value=-1.0), p["h1"], stride=2) + p["h1_bias"])
        h2_weight = p["h2"] * networks.connections[0]
        h = activation(F.conv2d(F.pad(h, (2,) * 4, value=-1.0), h2_weight, stride=2) + p["h2_bias"])
        h = activation(F.linear(h.flatten(1), p["h3"], p["h3_bias"]))
        torch.testing.assert_close(logits, F.linear(h, p["out"], p["out_bias"]))


def test_digits_are_shifted_by_one_pixel_in_all_directions():
    x = torch.rand(2, 50, 16, 16) * 2 - 1
    shifted = shift(x, torch.Generator().manual_seed(0))
    offsets = set()
    for before, after in zip(x.flatten(0, 1), shifted.flatten(0, 1)):
        padded = F.pad(before, (1, 1, 1, 1), value=-1.0)
        matches = [(i, j) for i in range(3) for j in range(3) if torch.equal(padded[i : i + 16, j : j + 16], after)]
        assert len(matches) == 1
        offsets |= set(matches)
    assert len(offsets) == 9


def test_folds_test_each_digit_once_and_never_train_on_it():
    splits = folds(103)
    assert sorted(i for _, test in splits for i in test.tolist()) == list(range(103))
    assert all(not set(train.tolist()) & set(test.tolist()) for train, test in splits)


def test_the_modern_recipe_reads_digits_better_than_that_of_1989_after_an_epoch():
    digits, labels = bundled_digits()
    train_indices, test_indices = folds(len(digits))[0]
    modern = replace(lecun1989.all_recipes()["+ ReLU, dropout"], epochs=8)
    errors = []
    for recipe, learning_rate in ((DigitRecipe(epochs=1), 0.03), (modern, 3e-3)):
        networks = train(recipe, digits, labels, [train_indices], [1], [learning_rate], lambda event: None)
        errors += error_rates(networks, digits, labels, [test_indices])
    assert errors[1] < 0.06
    assert errors[1] < errors[0]


@pytest.fixture
def _only_the_first_recipe(monkeypatch):
    monkeypatch.setattr(lecun1989, "CUMULATIVE", {"1989": {"epochs": 1}})
    monkeypatch.setattr(lecun1989, "ABLATIONS", {})
    monkeypatch.setattr(lecun1989, "LEARNING_RATES", {"sgd": (0.03,)})


@pytest.mark.usefixtures("_only_the_first_recipe")
def test_the_command_runs_a_recipe_once(home, capsys, tmp_path):
    lecun1989.command(lecun1989.Lecun1989Settings(seeds=1, json=True))
    first = capsys.readouterr().out
    lecun1989.command(lecun1989.Lecun1989Settings(seeds=1, json=True, out=tmp_path / "digits.md"))
    figures = json.loads(first)["recipes"]["1989"]
    assert f"{figures['error']:.2%}" in (tmp_path / "digits.md").read_text()
    ElementTree.parse(tmp_path / "digits.svg")
    assert capsys.readouterr().out == first
    assert figures["weights"] == 9760


def test_an_unknown_recipe_is_an_error():
    with pytest.raises(UserError, match="matches none of"):
        lecun1989.command(lecun1989.Lecun1989Settings(recipes="2089"))


@pytest.fixture
def mnist_folder(tmp_path):
    """20 training and 20 test images in MNIST's format: images compressed, labels not."""

    def header(*sizes):
        return bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)

    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    for part in ("train", "t10k"):
        content = header(20, 28, 28) + bytes(images.flatten().tolist())
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(header(20) + bytes(range(20)))
    return tmp_path, images


def test_mnist_is_read_in_its_own_format(mnist_folder):
    folder, images = mnist_folder
    digits, labels, first_test = mnist_digits(folder)
    assert first_test == 20
    assert digits.shape == (40, 16, 16)
    assert sorted(labels[:20].tolist()) == list(range(20))
    assert digits.min() >= -1
    assert digits.max() <= 1
    torch.testing.assert_close(digits[0], resize(images[labels[0]][None] / 255)[0])


def test_damaged_or_missing_mnist_files_are_errors(mnist_folder):
    folder, _ = mnist_folder
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0")
    with pytest.raises(UserError, match="format"):
        mnist_digits(folder)
    with pytest.raises(UserError, match="no train-images"):
        mnist_digits(folder / "nowhere")
