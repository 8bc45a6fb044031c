"""`nanoghost bench` on toy models: figures next to the limits of the machine, and errors of one line."""

import json

import pytest
import torch

from nanoghost.bench import decode, harness, pretrain, rl, train
from nanoghost.data.local import open_local
from nanoghost.engine import kernels, quantized_llama
from nanoghost.engine.engine import open_engine
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.formats.model_folder import load_tokenizer, save_model
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig

LIMITS = harness.MachineLimits("bfloat16", matrix_gflops_per_second=100.0, bandwidth_gb_per_second=10.0)


@pytest.fixture
def llama(nanoghost, toy_base):
    """A toy Llama whose heads have a width that the kernels support."""
    data = ModelFolder(toy_base).card.settings["data"]
    flags = ("--arch", "llama", "--steps", 1, "--depth", 2, "--context", 64)
    code, _, err = nanoghost("pretrain", "--tokenizer", toy_base, "--data", data, "--name", "small", *flags)
    assert code == 0, err
    folder = ModelFolder("small")
    model = Llama(LlamaConfig(320, 512, 2, 64, 1, 1, 96))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    save_model(folder.path, model, load_tokenizer(folder.path))
    return "small"


@pytest.fixture(autouse=True)
def _toy_text_and_fixed_limits(monkeypatch, toy_file):
    """Toy text instead of the plays, and limits that are not measured."""
    monkeypatch.setattr(harness, "open_data_source", lambda _: open_local(toy_file))
    for module in (decode, train, rl, pretrain):
        monkeypatch.setattr(module, "measure_limits", lambda: LIMITS)


def bench_rows(nanoghost, *arguments) -> list[dict]:
    """The table of `nanoghost bench` with these arguments."""
    code, out, err = nanoghost("bench", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["rows"]


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_prefill_reports_throughput_and_limit(nanoghost, toy_base, llama, arch):
    name = {"ghost": toy_base, "llama": llama}[arch]
    [row] = bench_rows(nanoghost, "prefill", name, "--tokens", 20, "--rounds", 1)
    assert row["workload"] == "prefill"
    assert row["tokens_per_second"] > 0
    assert row["limit"] > 0


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_decode_measures_each_number_of_streams(nanoghost, toy_base, llama, arch):
    name = {"ghost": toy_base, "llama": llama}[arch]
    rows = bench_rows(nanoghost, "decode", name, "--streams", "1,3", "--tokens", 4, "--rounds", 1)
    assert [row["streams"] for row in rows[:2]] == [1, 3]


PRETRAIN = ("pretrain", "--vocab-size", 320, "--context", 32, "--steps", 1, "--rounds", 1)


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_pretrain_reports_mfu_and_draws_it(nanoghost, toy_file, tmp_path, arch):
    picture = tmp_path / "mfu.svg"
    flags = ("--data", toy_file, "--arch", arch, "--depths", "1,2", "--batches", "2,4", "--out", picture)
    rows = bench_rows(nanoghost, *PRETRAIN, *flags)
    workloads = [(row["workload"][:7], row["streams"]) for row in rows]
    assert workloads == [("depth 1", 2), ("depth 1", 4), ("depth 2", 2), ("depth 2", 4)]
    assert rows[0]["limit"] > rows[2]["limit"] > 0
    assert all(row["fraction"] > 0 for row in rows)
    svg = picture.read_text()
    assert svg.count("<polyline") == 2, "a line for each batch size"
    assert svg.count("<circle") == 4, "a point for each workload"
    assert svg.count("2 rows") == svg.count("4 rows") == 1


def test_pretrain_refuses_a_depth_that_is_not_a_number(nanoghost, toy_file):
    code, _, err = nanoghost("bench", *PRETRAIN, "--data", toy_file, "--depths", "2,x")
    assert code == 2
    assert "--depths" in err


TRAIN = ("--rounds", 1, "--batch", 2, "--steps", 1)


@pytest.mark.parametrize(("arch", "lora"), [("ghost", 0), ("llama", 2)])
def test_train_measures_text_and_conversations(nanoghost, toy_base, llama, arch, lora):
    name = {"ghost": toy_base, "llama": llama}[arch]
    rows = bench_rows(nanoghost, "train", name, "--lora", lora, *TRAIN)
    assert [row["workload"] for row in rows] == ["text", "conversations"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert all(row["limit"] > 0 for row in rows)


def test_train_refuses_lora_for_a_ghost(nanoghost, toy_base):
    code, _, err = nanoghost("bench", "train", toy_base, "--lora", 2, *TRAIN)
    assert code == 2
    assert "--lora 0" in err


def test_rl_counts_rollouts(nanoghost, llama):
    [row] = bench_rows(nanoghost, "rl", llama, "--problems", 2, "--rollouts", 2, "--rounds", 1)
    assert row["rollouts_per_minute"] > 0
    assert "limit" not in row


def test_rl_refuses_an_unknown_task(nanoghost, llama):
    code, _, _ = nanoghost("bench", "rl", llama, "--task", "chess")
    assert code == 2


@pytest.mark.skipif(bool(kernels.unavailable_reason()), reason="the kernels do not run on this machine")
def test_fewer_bits_take_less_memory_and_lose_little_quality(nanoghost, llama):
    rows = {row["weights"]: row for row in bench_rows(nanoghost, "quantization", llama, "--tokens", 120)}
    megabytes = [rows[name]["megabytes"] for name in ("fp32", "16 bits", "8 bits", "4 bits")]
    assert megabytes == sorted(set(megabytes), reverse=True)
    assert abs(rows["16 bits"]["increase"]) < 0.02
    assert abs(rows["8 bits"]["increase"]) < 0.05


def test_quantization_refuses_a_model_that_runs_in_pytorch(nanoghost, toy_base):
    code, _, err = nanoghost("bench", "quantization", toy_base)
    assert code == 2
    assert "not quantized" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--streams", "two"), "--streams"),
        (("decode", "--streams", "0"), "--streams"),
        (("decode", "--tokens", "1"), "--tokens"),
        (("prefill", "--rounds", "0"), "--rounds"),
        (("prefill", "--against", "vllm"), "only nanoghost can run"),
    ],
)
def test_an_invalid_flag_gives_an_error_of_one_line(nanoghost, toy_base, arguments, message):
    code, _, err = nanoghost("bench", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_without_a_compiler_the_kernels_are_unavailable(monkeypatch, home):
    monkeypatch.setenv("CXX", "/bin/false")
    assert kernels.unavailable_reason.__wrapped__() != "", "computed again: the cached reason may be another"


def test_without_kernels_a_llama_runs_in_pytorch(llama, monkeypatch):
    monkeypatch.setattr(quantized_llama.kernels, "unavailable_reason", lambda: "there is no C++ compiler")
    engine = open_engine(ModelFolder(llama))
    assert isinstance(engine.runner, TorchRunner)
