"""The network of 1989: its size, its arithmetic beside PyTorch's own layers, and what it learns from."""

import gzip
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from nanoghost.errors import UserError
from nanoghost.lab import lecun1989 as lab


def test_the_paper_counts_as_many_weights():
    assert lab.Networks(1, lab.Rung(), [0]).weights() == 9760


@pytest.mark.parametrize("relu", [False, True])
def test_stacked_networks_are_what_each_would_be_alone(relu):
    rung = lab.Rung(relu=relu, maps=6)
    networks = lab.Networks(3, rung, [5, 6, 7])
    for bias in (p for name, p in networks.parameters.items() if name.endswith("bias")):
        torch.nn.init.uniform_(bias.data, -1, 1)
    x = torch.rand(3, 4, 16, 16) * 2 - 1
    act = torch.relu if relu else torch.tanh
    for i, said in enumerate(networks.forward(x)):
        p = {name: t[i] for name, t in networks.parameters.items()}
        h = act(F.conv2d(F.pad(x[i][:, None], (2,) * 4, value=-1.0), p["h1"], stride=2) + p["h1_bias"])
        h = act(F.conv2d(F.pad(h, (2,) * 4, value=-1.0), p["h2"] * networks.sees[0], stride=2) + p["h2_bias"])
        alone = F.linear(act(F.linear(h.flatten(1), p["h3"], p["h3_bias"])), p["out"], p["out_bias"])
        torch.testing.assert_close(said, alone)


def test_a_moved_digit_is_the_digit_moved():
    x = torch.rand(2, 50, 16, 16) * 2 - 1
    found = lab.moved(x, torch.Generator().manual_seed(0))
    seen = set()
    for before, after in zip(x.flatten(0, 1), found.flatten(0, 1)):
        padded = F.pad(before, (1, 1, 1, 1), value=-1.0)
        places = [(i, j) for i in range(3) for j in range(3) if torch.equal(padded[i : i + 16, j : j + 16], after)]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == 9


def test_folds_ask_for_each_digit_once_and_never_for_one_that_was_taught():
    folds = lab.splits(103)
    assert sorted(i for _, asked in folds for i in asked.tolist()) == list(range(103))
    assert all(not set(taught.tolist()) & set(asked.tolist()) for taught, asked in folds)


def test_the_present_reads_what_two_passes_of_1989_do_not(tmp_path):
    digits, labels = lab.bundled()
    folds = lab.splits(len(digits))[:1]
    old, new = (
        lab.learn(rung, digits, labels, [folds[0][0]], [1], [rate], lambda event: None)
        for rung, rate in ((lab.Rung(passes=1), 0.03), (replace(lab.rungs()["+ ReLU, dropout"], passes=8), 3e-3))
    )
    before, after = (lab.wrong(networks, digits, labels, [folds[0][1]])[0] for networks in (old, new))
    assert after < 0.06 and after < before


def test_a_rung_is_climbed_once(home, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "LADDER", {"1989": {"passes": 1}})
    monkeypatch.setattr(lab, "LEFT_OUT", {})
    monkeypatch.setattr(lab, "RATES", {"sgd": (0.03,)})
    lab.command(lab.Lecun1989Settings(seeds=1, json=True))
    first = capsys.readouterr().out
    lab.command(lab.Lecun1989Settings(seeds=1, json=True, out=tmp_path / "digits.md"))
    assert f"{json.loads(first)['rungs']['1989']['error']:.2%}" in (tmp_path / "digits.md").read_text()
    ElementTree.parse(tmp_path / "digits.svg")
    assert capsys.readouterr().out == first and json.loads(first)["rungs"]["1989"]["weights"] == 9760
    with pytest.raises(UserError, match="names none of"):
        lab.command(lab.Lecun1989Settings(rungs="2089"))


def test_mnist_is_read_in_its_own_format(tmp_path):
    def header(*sizes):
        return bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)

    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header(20, 28, 28) + bytes(images.flatten().tolist()))
        )
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(header(20) + bytes(range(20)))
    digits, labels, first_test = lab.mnist(tmp_path)
    assert first_test == 20 and digits.shape == (40, 16, 16) and sorted(labels[:20].tolist()) == list(range(20))
    assert digits.min() >= -1 and digits.max() <= 1
    torch.testing.assert_close(digits[0], lab.enlarged(images[labels[0]][None] / 255)[0])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0")
    with pytest.raises(UserError, match="format"):
        lab.mnist(tmp_path)
    with pytest.raises(UserError, match="no train-images"):
        lab.mnist(tmp_path / "nowhere")
