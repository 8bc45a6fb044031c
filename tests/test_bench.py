"""bench and the machine it runs on: figures beside limits, clear words for what cannot be measured, and no compiler."""

import json

import pytest
import torch

from nanoghost.bench import decode, pretrain, rl, table, train
from nanoghost.data.local import open_local
from nanoghost.engine import kernels, quantized_llama
from nanoghost.engine.engine import open_engine
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.formats.model_folder import load_tokenizer, save_model
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig


@pytest.fixture
def llama(nanoghost, toy_base):
    """A toy Llama with heads as wide as the kernels want them."""
    code, _, err = nanoghost("pretrain", "--tokenizer", toy_base, "--data", ModelFolder(toy_base).card.settings["data"],
                             "--name", "small", "--arch", "llama", "--steps", 1, "--depth", 2, "--context", 64)  # fmt: skip
    assert code == 0, err
    folder = ModelFolder("small")
    model = Llama(LlamaConfig(320, 512, 2, 64, 1, 1, 96))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    save_model(folder.path, model, load_tokenizer(folder.path))
    return "small"


@pytest.fixture(autouse=True)
def quick(monkeypatch, toy_file):
    monkeypatch.setattr(table, "open_source", lambda _: open_local(toy_file))
    limits = {"dtype": "bfloat16", "matrix_gflops_per_second": 100.0, "bandwidth_gb_per_second": 10.0}
    for module in (decode, train, rl, pretrain):
        monkeypatch.setattr(module, "limits", lambda: limits)


def test_figures_stand_beside_limits(nanoghost, toy_base, llama):
    for name in (toy_base, llama):
        code, out, err = nanoghost("bench", "prefill", name, "--tokens", 20, "--rounds", 1, "--json")
        assert code == 0, err
        [row] = json.loads(out)["rows"]
        assert row["work"] == "prefill" and row["tokens_per_second"] > 0 and row["limit"] > 0
        code, out, err = nanoghost("bench", "decode", name, "--streams", "1,3", "--tokens", 4, "--rounds", 1, "--json")
        assert code == 0, err
        rows = json.loads(out)["rows"]
        assert [row["streams"] for row in rows[:2]] == [1, 3]


def test_a_step_of_pretraining_stands_beside_its_limit(nanoghost, toy_file, tmp_path):
    words = (
        "bench",
        "pretrain",
        "--data",
        toy_file,
        "--vocab-size",
        320,
        "--context",
        32,
        "--steps",
        1,
        "--rounds",
        1,
        "--json",
    )
    for arch in ("ghost", "llama"):
        picture = tmp_path / f"{arch}.svg"
        code, out, err = nanoghost(*words, "--arch", arch, "--depths", "1,2", "--batches", "2,4", "--out", picture)
        assert code == 0, err
        assert [picture.read_text().count(mark) for mark in ("<polyline", "<circle", "2 rows", "4 rows")] == [
            2,
            4,
            1,
            1,
        ]
        rows = json.loads(out)["rows"]
        assert [(row["work"][:7], row["streams"]) for row in rows] == [
            ("depth 1", 2),
            ("depth 1", 4),
            ("depth 2", 2),
            ("depth 2", 4),
        ]
        assert rows[0]["limit"] > rows[2]["limit"] > 0 and all(row["share"] > 0 for row in rows)
    code, _, err = nanoghost(*words, "--depths", "2,x")
    assert code == 2 and "--depths" in err


def test_training_stands_beside_its_limit(nanoghost, toy_base, llama):
    few = ("--rounds", 1, "--batch", 2, "--steps", 1, "--json")
    for name, lora in ((toy_base, 0), (llama, 2)):
        code, out, err = nanoghost("bench", "train", name, "--lora", lora, *few)
        assert code == 0, err
        rows = json.loads(out)["rows"]
        assert [row["work"] for row in rows] == ["text", "conversations"]
        assert all(row["tokens_per_second"] > 0 and row["limit"] > 0 for row in rows)
    code, _, err = nanoghost("bench", "train", toy_base, "--lora", 2, *few)
    assert code == 2 and "--lora 0" in err


def test_practice_is_counted_in_attempts(nanoghost, llama):
    code, out, err = nanoghost("bench", "rl", llama, "--problems", 2, "--attempts", 2, "--rounds", 1, "--json")
    assert code == 0, err
    [row] = json.loads(out)["rows"]
    assert row["attempts_per_minute"] > 0 and "limit" not in row
    assert nanoghost("bench", "rl", llama, "--task", "chess")[0] == 2


@pytest.mark.skipif(bool(kernels.unavailable_reason()), reason="no kernels here")
def test_fewer_bits_cost_more(nanoghost, llama, toy_base):
    code, out, err = nanoghost("bench", "packing", llama, "--tokens", 120, "--json")
    assert code == 0, err
    rows = {row["work"]: row for row in json.loads(out)["rows"]}
    assert (
        rows["fp32"]["megabytes"]
        > rows["16 bits"]["megabytes"]
        > rows["8 bits"]["megabytes"]
        > rows["4 bits"]["megabytes"]
    )
    assert abs(rows["16 bits"]["more"]) < 0.02 and abs(rows["8 bits"]["more"]) < 0.05
    code, _, err = nanoghost("bench", "packing", toy_base)
    assert code == 2 and "not packed" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (("decode", "--streams", "two"), "--streams"),
        (("decode", "--streams", "0"), "--streams"),
        (("decode", "--tokens", "1"), "--tokens"),
        (("prefill", "--rounds", "0"), "--rounds"),
        (("prefill", "--against", "vllm"), "runs only here"),
    ],
)
def test_mistakes_get_a_line(nanoghost, toy_base, words, said):
    code, _, err = nanoghost("bench", *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_without_a_compiler_everything_works_and_the_reason_is_known(llama, monkeypatch, home):
    monkeypatch.setenv("CXX", "/bin/false")
    assert "compiler" in kernels.unavailable_reason.__wrapped__() or kernels.unavailable_reason()
    monkeypatch.setattr(quantized_llama.kernels, "unavailable_reason", lambda: "there is no C++ compiler")
    engine = open_engine(ModelFolder(llama))
    assert isinstance(engine.runner, TorchRunner)
