"""`nanoghost plan` compared with real models, a real step, and runs that others published."""

import json
from dataclasses import replace

import pytest
import torch

from nanoghost import hardware, speedrun
from nanoghost.commands.plan import PlanSettings, command, make_plan
from nanoghost.commands.plan_hardware import parse_hardware
from nanoghost.commands.plan_memory import activation_bytes, meta_optimizer, plan_memory, saved_bytes
from nanoghost.errors import UserError
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.optim.optimizer import Optimizer
from nanoghost.train.hyperparameters import depth_for, pretrain_groups, usable_gflops_per_second
from nanoghost.train.pretrain import accumulate_gradients

GHOST = GhostConfig(vocab_size=640, context=96, depth=3, width=192)
LLAMA = LlamaConfig(vocab_size=640, context=96, depth=3, width=192, heads=3, key_value_heads=3, mlp_width=512)


@pytest.fixture(autouse=True)
def _fixed_matmul_speed(monkeypatch):
    monkeypatch.setattr("nanoghost.hardware.matmul_gflops_per_second", lambda dtype: 100.0)


def planned_bytes(model_class, config, dtype, hardware_name="h100") -> dict[str, int]:
    cluster = parse_hardware(hardware_name)
    with torch.device("meta"):
        model = model_class(config).cast(dtype)
    optimizer = meta_optimizer(model, dtype, cluster.count)
    return plan_memory(model, optimizer, cluster, row_bytes=0.0, rows=1).parts


@pytest.mark.parametrize("config, model_class", [(GHOST, Ghost), (LLAMA, Llama)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_the_meta_device_are_those_of_a_real_model(config, model_class, dtype):
    planned = planned_bytes(model_class, config, dtype)
    model = model_class(config).cast(dtype)
    optimizer = Optimizer(model, pretrain_groups(config.width), dtype)
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    states = sum(t.numel() * t.element_size() for b in optimizer.buckets.values() for t in b.state().values())
    assert planned["weights"] == weights
    assert planned["optimizer"] == states


def test_optimizer_states_are_sharded_over_the_devices():
    config = replace(GHOST, depth=8)
    one = planned_bytes(Ghost, config, torch.float32)["optimizer"]
    eight = planned_bytes(Ghost, config, torch.float32, "8xh100")["optimizer"]
    assert one / 8 <= eight <= one / 8 * 1.02  # a matrix is never split


@pytest.mark.parametrize(
    "arch, config",
    [("ghost", GHOST), ("llama", LLAMA), ("ghost", replace(GHOST, depth=5, width=128, context=160, vocab_size=2048))],
)
def test_activations_are_extrapolated_to_sizes_that_were_not_fitted(arch, config):
    measured = saved_bytes(config, torch.bfloat16)
    assert activation_bytes(arch, config, torch.bfloat16) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_a_real_step_takes_the_planned_memory(arch):
    planned = make_plan(PlanSettings(depth=4, arch=arch, vocab_size=2048, context=128, batch_tokens=2048))
    config_class, model_class = (GhostConfig, Ghost) if arch == "ghost" else (LlamaConfig, Llama)
    config = config_class(vocab_size=2048, context=128, depth=4, width=256)
    bf16 = planned.memory_bytes_per_device["weights"] < 4 * planned.parameters
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokens = torch.randint(2048, (16, 129))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = model_class(config).cast(dtype)
        optimizer = Optimizer(model, pretrain_groups(256), dtype)
        accumulate_gradients(model, tokens[:, :-1], tokens[:, 1:], planned.micro_batch)
        optimizer.step()
    allocations = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    assert planned.memory_bytes == pytest.approx(peak, rel=0.15)


# Runs on eight H100: settings of our plan, tokens, and the seconds that the run took. Schedules and details differ;
# layers, width, vocabulary, context and tokens are the same.
PUBLISHED = {
    # nanochat, dev/LEADERBOARD.md, run 1: depth 24, 16,704 steps of 524,288 tokens
    "nanochat d24": ({"depth": 24}, 16704 * 524288, 10949),
    # nanochat, dev/LOG.md: depth 26 in bf16, 630,000 tokens/s; a billion of them
    "nanochat d26": ({"depth": 26}, 10**9, 10**9 / 630e3),
    # llm.c's GPT-2 124M, 10 billion tokens in 45 minutes
    "llm.c": ({"depth": 12, "vocab_size": 50304, "context": 1024}, 10**10, 45 * 60),
    # modded-nanogpt, records 7, 8 and 10 (logs of October 18th, November 3rd and 8th, 2024)
    "modded-nanogpt 7": ({"depth": 12, "vocab_size": 50304, "context": 1024}, 5100 * 524288, 721.9),
    "modded-nanogpt 8": ({"depth": 12, "vocab_size": 50304, "context": 1024}, 4578 * 524288, 648.1),
    "modded-nanogpt 10": ({"depth": 12, "vocab_size": 50304, "context": 1024}, 3242 * 524288, 467.6),
}


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_runs_took_about_as_long_as_planned(run):
    sizes, tokens, seconds = PUBLISHED[run]
    planned = tokens / make_plan(PlanSettings(hardware="8xH100", tokens_per_parameter=1.0, **sizes)).tokens_per_second
    print(f"{run}: {planned:.0f} s planned, {seconds:.0f} s taken, {planned / seconds - 1:+.0%}")
    assert planned == pytest.approx(seconds, rel=0.25)


def test_eight_devices_take_an_eighth_of_the_time():
    one, eight = (make_plan(PlanSettings(depth=12, hardware=name)) for name in ("h100", "8xH100"))
    assert one.tokens == eight.tokens
    assert one.seconds == pytest.approx(8 * eight.seconds)
    assert eight.micro_batch <= 256 // 8
    assert "torchrun" in eight.command
    assert "torchrun" not in one.command


def test_more_minutes_allow_a_deeper_model():
    hour = make_plan(PlanSettings(minutes=60, hardware="8xH100"))
    assert hour.seconds == pytest.approx(3600, rel=0.01)
    assert make_plan(PlanSettings(minutes=240, hardware="8xH100")).depth > hour.depth


def test_the_command_prints_json(capsys):
    command(PlanSettings(depth=2, json=True))
    assert json.loads(capsys.readouterr().out)["depth"] == 2


def test_communication_of_gradients_and_weights():
    one, eight, many = (
        make_plan(PlanSettings(depth=4, hardware=name, batch_tokens=2**21)) for name in ("h100", "8xH100", "64xH100")
    )
    assert one.communication_bytes_per_step == 0
    assert one.communication_seconds_per_step == 0
    embeddings = eight.parameters - eight.parameter_counts["matrices"] - eight.parameter_counts["head"]
    # gradients in fp32; weights in bf16, embeddings in fp32
    least = (6 * (eight.parameters - embeddings) + 8 * embeddings) * 7 / 8
    assert least <= eight.communication_bytes_per_step < 1.1 * least, "a little is padding"
    assert eight.seconds == pytest.approx(one.seconds / 8), "within a node the MFU includes it"
    assert many.communication_seconds_per_step > eight.communication_seconds_per_step
    assert eight.seconds / 8 < many.seconds < eight.seconds


def test_a_plan_says_when_memory_is_too_small():
    assert not make_plan(PlanSettings(depth=40, hardware="3090")).fits


@pytest.mark.parametrize(
    "wrong", [{"hardware": "8xTPU"}, {"hardware": "0xH100"}, {"depth": -1}, {"mfu": 0.0}, {"arch": "gpt"}]
)
def test_impossible_settings_are_rejected(wrong):
    with pytest.raises(UserError):
        make_plan(PlanSettings(**wrong))


def test_the_depth_depends_on_minutes_times_matmul_speed():
    assert depth_for(4.0, 380.0)[0] == depth_for(10.0, 152.0)[0] == depth_for(0.4, 3800.0)[0]
    depths = [depth_for(minutes, rate)[0] for rate in (40.0, 400.0, 4e5) for minutes in (0.5, 4.0, 60.0, 600.0)]
    assert all(depths[i : i + 4] == sorted(depths[i : i + 4]) for i in (0, 4, 8))
    assert depths[1] < depths[5] < depths[9]


def test_a_peak_that_training_does_not_reach_does_not_count(monkeypatch):
    """AMX measures several times what its training steps reach; the depth for it was too large."""
    monkeypatch.setattr(hardware, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(hardware, "threads", lambda: 2)
    assert usable_gflops_per_second(5000.0) == 760.0
    assert usable_gflops_per_second(150.0) == 150.0


def test_a_speedrun_chooses_its_depth_for_the_minutes_of_all_stages(nanoghost, toy_file, home, monkeypatch):
    monkeypatch.setattr(hardware, "matmul_gflops_per_second", lambda *_: 380.0)
    base = speedrun.stage_settings(speedrun.SpeedrunSettings())[0]
    assert base.dial_minutes > base.minutes
    assert depth_for(base.dial_minutes)[0] > depth_for(base.minutes)[0]
    code, _, err = nanoghost(
        "pretrain", "--data", toy_file, "--steps", 1, "--dial-minutes", base.dial_minutes, "--vocab-size", 320
    )
    assert code == 0, err
    card = json.loads((home / "models" / "ghost-base" / "card.json").read_text())
    assert card["depth"] == depth_for(base.dial_minutes)[0]
