"""Faults during training: processes are killed, stopped or hang, losses are NaN, memory is short, text is damaged.

The faults are injected into the real program. Scenarios with several ranks run in a new process, which forks the ranks
before it has computed anything.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoghost import cli, distributed, hardware
from nanoghost.data import block_checksums, tokenize_source
from nanoghost.data.batches import Batches
from nanoghost.home import ModelFolder
from nanoghost.train import pretrain
from tests.support.ranks import codes_of, fork_ranks
from tests.support.toys import toy_text

TOY = "--arch llama --depth 2 --context 64 --batch 6 --vocab-size 320 --learning-rate 0.3".split()


def run_pretrain(name: str, *words) -> None:
    cli.main(["pretrain", "--data", "notes.txt", "--name", name, "--steps", "10", *TOY, *map(str, words)])


def losses(name: str) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in ModelFolder(name).events if "loss" in e}


def in_new_process(scenario: str, folder: Path, *arguments) -> dict:
    """Run a function of this file in a new process; returns its result and what the process printed ("stderr")."""
    (folder / "notes.txt").write_text(toy_text(400))
    code = f"import json, tests.test_fault_tolerance as t; print(json.dumps(t.{scenario}(*{arguments!r})))"
    environment = os.environ | {"NANOGHOST_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "NANOGHOST_DEBUG": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr}


def in_fp32(function, *arguments) -> None:
    hardware.cpu_dtype = lambda flags: torch.float32
    function(*arguments)


def run_ranks(world_size: int, function, *arguments) -> list[int]:
    """Exit codes of `function` in that many ranks."""
    return codes_of(fork_ranks(world_size, in_fp32, function, *arguments))


# -- NaN losses ------------------------------------------------------------------------------------------------------


def pretrain_with_nan_loss(batches: list[int], name: str, *words) -> None:
    """On rank 1 the loss of these batches is NaN."""
    original_at, original_gradients, used = Batches.at, pretrain.accumulate_gradients, []

    def recording_at(self, number):
        used.append(number)
        return original_at(self, number)

    def sometimes_nan(*arguments):
        loss = original_gradients(*arguments)
        return float("nan") if used[-1] in batches and distributed.rank_and_world_size()[0] == 1 else loss

    Batches.at, pretrain.accumulate_gradients = recording_at, sometimes_nan
    run_pretrain(name, *words)


def nan_at_step_5_stop_then_skip() -> dict:
    stopped = run_ranks(2, pretrain_with_nan_loss, [5], "toy")
    resumed = run_ranks(2, run_pretrain, "toy", "--bad-loss", "skip")
    return {"stopped": stopped, "resumed": resumed, "losses": len(losses("toy"))}


def nan_loss(batches: list[int], policy: str) -> dict:
    codes = run_ranks(2, pretrain_with_nan_loss, batches, "toy", "--bad-loss", policy)
    folder = ModelFolder("toy")
    return {"codes": codes, "events": folder.events, "skipped_batches": folder.card.skipped_batches}


def test_a_nan_loss_on_one_rank_stops_all_ranks_and_the_run_can_be_resumed(tmp_path):
    result = in_new_process("nan_at_step_5_stop_then_skip", tmp_path)
    assert result["stopped"] == [2, 2]
    assert "the loss is nan at step 5, on rank 1 (training examples [" in result["stderr"]
    assert result["resumed"] == [0, 0]
    assert result["losses"] == 10


def test_with_skip_the_batch_is_skipped_and_the_fourth_in_a_row_stops_the_run(tmp_path):
    result = in_new_process("nan_loss", tmp_path, [4, 5, 6, 7], "skip")
    assert result["codes"] == [2, 2]
    assert "as at the previous 3 steps" in result["stderr"]
    skipped = [e for e in result["events"] if "bad_loss" in e]
    assert [e["step"] for e in skipped] == [4, 5, 6, 7]
    assert list(skipped[0]["examples"]) == ["1"], "only rank 1 had a NaN"
    assert len(skipped[0]["examples"]["1"]) == 3, "half of the 6 rows of the batch"


def test_with_roll_back_the_run_returns_to_the_last_checkpoint_and_skips_the_batches_up_to_the_bad_one(tmp_path):
    result = in_new_process("nan_loss", tmp_path, [5], "roll-back")
    assert result["codes"] == [0, 0]
    assert result["skipped_batches"] == [[0, 6]], "back to step 0, which continues with batch 6"
    steps = {e["step"] for e in result["events"] if "loss" in e}
    assert steps == set(range(10))


# -- stopped, and resumed with another number of processes -----------------------------------------------------------


def pretrain_with_sigterm_at(step: int, name: str) -> None:
    """Rank 1 gets SIGTERM."""
    original_at = Batches.at

    def at_with_signal(self, number):
        if number == step and distributed.rank_and_world_size()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original_at(self, number)

    Batches.at = at_with_signal
    run_pretrain(name)


def stop_and_resume_with_other_world_sizes() -> dict:
    alone = run_ranks(1, run_pretrain, "alone")
    three = run_ranks(3, pretrain_with_sigterm_at, 5, "stopped")
    saved = (ModelFolder("stopped").path / "state" / "latest").read_text()
    two = run_ranks(2, pretrain_with_sigterm_at, 7, "stopped")
    one = run_ranks(1, run_pretrain, "stopped")
    return {
        "codes": [alone, three, two, one],
        "saved": saved.strip(),
        "alone": [losses("alone")[step] for step in range(10)],
        "stopped": [losses("stopped")[step] for step in range(10)],
    }


def test_sigterm_to_one_rank_stops_all_with_0_and_other_world_sizes_resume(tmp_path):
    result = in_new_process("stop_and_resume_with_other_world_sizes", tmp_path)
    assert result["codes"] == [[0], [0, 0, 0], [0, 0], [0]]
    assert result["saved"] == "00000005"
    assert "stopped is saved at step 7 of 10" in result["stderr"]
    assert result["stopped"] == pytest.approx(result["alone"], rel=1e-5)


# -- a hang ----------------------------------------------------------------------------------------------------------


def pretrain_with_hang(name: str) -> None:
    """Rank 1 hangs at step 3."""
    original_at = Batches.at

    def hanging_at(self, number):
        if number == 3 and distributed.rank_and_world_size()[0] == 1:
            time.sleep(600)
        return original_at(self, number)

    Batches.at = hanging_at
    run_pretrain(name, "--hang-minutes", 0.1)


def hang() -> dict:
    start = time.time()
    codes = run_ranks(2, pretrain_with_hang, "hung")
    stacks = [(ModelFolder("hung").path / f"stacks-rank-{rank}.txt").read_text() for rank in range(2)]
    return {"codes": codes, "seconds": time.time() - start, "stacks": stacks}


def test_a_hang_ends_with_a_stack_dump_of_every_rank(tmp_path):
    result = in_new_process("hang", tmp_path)
    assert result["codes"] == [1, 1]
    assert result["seconds"] < 300
    waiting, hanging = result["stacks"]
    assert "in hanging_at" in hanging
    assert "in all_reduce_mean" in waiting


# -- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_out_of_memory_in_the_first_step_halves_the_micro_batch_and_does_not_change_the_losses(
    nanoghost, toy_file, monkeypatch, stage
):
    """With more than two rows in a pass the allocator fails, after gradients of the pass have been accumulated."""
    monkeypatch.setattr(hardware, "cpu_dtype", lambda flags: torch.float32)
    assert nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 3, *TOY)[0] == 0
    words = {"pretrain": ("--data", toy_file, *TOY), "sft": ("toy", "--conversations", 100, "--batch", 6)}[stage]
    assert nanoghost(stage, *words, "--name", "toy-enough", "--steps", 3)[0] == 0
    module = importlib.import_module(f"nanoghost.train.{stage}")
    function = {"pretrain": "accumulate_gradients", "sft": "accumulate_packed_gradients"}[stage]
    original = getattr(module, function)

    def needs_memory(model, *batch_and_rows):
        loss = original(model, *batch_and_rows)
        return torch.empty(2**50 if batch_and_rows[-1] > 2 else 0).sum().item() + loss

    monkeypatch.setattr(module, function, needs_memory)
    code, _, err = nanoghost(stage, *words, "--name", "toy-little", "--steps", 3)
    assert code == 0, err
    assert "out of memory: reducing the micro-batch from" in err
    assert "to 2 rows" in err

    def stage_losses(name):
        return [e["loss"] for e in ModelFolder(name).events if e["stage"] == stage and "loss" in e]

    assert len(stage_losses("toy-little")) == 3
    assert stage_losses("toy-little") == pytest.approx(stage_losses("toy-enough"), rel=1e-5)


# -- damaged text ----------------------------------------------------------------------------------------------------


def test_a_damaged_block_of_a_large_text_is_reported_and_never_trained_on(nanoghost, toy_file, home, monkeypatch):
    monkeypatch.setattr(tokenize_source, "BLOCK_CHECKSUM_MIN_BYTES", 1)
    monkeypatch.setattr(block_checksums, "BLOCK", 1024)
    common = ("pretrain", "--data", toy_file, "--steps", 60, *TOY)
    assert nanoghost(*common, "--name", "whole")[0] == 0
    (path,) = home.glob("data/*/train.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, err = nanoghost(*common, "--name", "damaged")
    line = err.strip().splitlines()[-1]
    start = len(content) // 2 // 1024 * 1024
    assert code == 2
    assert str(path) in line
    assert f"bytes {start} to {start + 1024}" in line
    before_the_damage = losses("damaged")
    assert 0 < len(before_the_damage) < 60
    assert all(losses("whole")[step] == loss for step, loss in before_the_damage.items())


def test_every_block_that_is_touched_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(block_checksums, "BLOCK", 8)
    path = tmp_path / "train.bin"
    np.arange(40, dtype="<u2").tofile(path)  # ten blocks of four tokens
    check = block_checksums.BlockChecksums(path, block_checksums.file_checksums(path, 1)["blocks"], 2)
    check.check(np.array([2, 11]), 5)
    assert np.flatnonzero(check.verified).tolist() == [0, 1, 2, 3]
    assert "blocks" not in block_checksums.file_checksums(path, 1000)


# -- killed under torchrun -------------------------------------------------------------------------------------------

KILLED_RUN = ["pretrain", "--data", "notes.txt", "--steps", "120", *TOY, "--checkpoint-seconds", "0.2"]


def rank_processes(parent: int) -> dict[int, int]:
    """The processes that a torchrun has started: rank -> process id."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v)
                processes[int(variables["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError):
            continue
    return processes


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_after_a_rank_is_killed_torchrun_restarts_the_run_with_the_same_losses(tmp_path):
    (tmp_path / "notes.txt").write_text(toy_text(400))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "2", "-m", "nanoghost"]
    process = subprocess.Popen(
        [*torchrun, *KILLED_RUN, "--name", "killed", "--force"],
        cwd=tmp_path,
        stderr=open(tmp_path / "stderr", "w"),  # noqa: SIM115
    )
    folder = ModelFolder("killed")
    while not list((folder.path / "state").glob("*/manifest.json")):
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    ranks = rank_processes(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    start = time.time()
    while Path(f"/proc/{ranks[0]}").exists() and time.time() - start < 20:
        time.sleep(0.02)
    noticed = time.time() - start
    assert noticed < 10, "the other rank must end, too"
    assert process.wait(timeout=400) == 0, (tmp_path / "stderr").read_text()
    print(f"noticed after {noticed:.1f} s")
    lines = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert sum(e["step"] == 0 and "loss" in e for e in lines) == 1, "in spite of --force it must not start again"
    (tmp_path / "home").mkdir(exist_ok=True)
    assert in_new_process("undisturbed", tmp_path)["losses"] == list(losses("killed").values())


def undisturbed() -> dict:
    codes_of(fork_ranks(2, cli.main, [*KILLED_RUN, "--name", "undisturbed"]))
    return {"losses": list(losses("undisturbed").values())}
