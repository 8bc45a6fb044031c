"""What goes wrong while training: processes killed and asked to stop, hangs, losses that are no number, too little memory, damaged
text. Faults are put into the real program; what it then does is its own."""

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
from nanoghost.home import ModelFolder
from tests.support.ranks import codes_of, fork_ranks

TOY = (
    "--arch",
    "llama",
    "--depth",
    "2",
    "--context",
    "64",
    "--batch",
    "6",
    "--vocab-size",
    "320",
    "--learning-rate",
    "0.3",
)


def pretrain(name: str, *words) -> None:
    cli.main(["pretrain", "--data", "notes.txt", "--name", name, "--steps", "10", *TOY, *map(str, words)])


def losses(name: str) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in ModelFolder(name).events if "loss" in e}


def weights(name: str) -> bytes:
    return (ModelFolder(name).path / "model.safetensors").read_bytes()


def forked(scenario: str, folder: Path) -> dict:
    """What a scenario of this file found out, run in a process that has not computed anything yet."""
    from tests.conftest import toy_text

    (folder / "notes.txt").write_text(toy_text(400))
    code = f"import json, tests.test_fault_tolerance as t; print(json.dumps(t.{scenario}()))"
    environment = os.environ | {"NANOGHOST_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "NANOGHOST_DEBUG": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"said": done.stderr}


def in_fp32(function, *arguments) -> None:
    hardware.cpu_dtype = lambda flags: torch.float32
    function(*arguments)


def ranks(world: int, function, *arguments) -> list[int]:
    return codes_of(fork_ranks(world, in_fp32, function, *arguments))


# ── a loss that is no number ────────────────────────────────────────────────────────────────────────────────────────


def bad_at(*bad: int, rank: int = 1):
    """Batches of these numbers have a loss that is no number, on one rank."""
    from nanoghost.data.batches import Batches
    from nanoghost.train import pretrain as stage

    at, step, seen = Batches.at, stage.train_step, []
    Batches.at = lambda self, number: seen.append(number) or at(self, number)

    def train_step(*arguments):
        loss = step(*arguments)
        return float("nan") if seen[-1] in bad and distributed.rank_and_world_size()[0] == rank else loss

    stage.train_step = train_step


def with_bad(bad: list[int], name: str, *words) -> None:
    bad_at(*bad)
    pretrain(name, *words)


def bad_losses() -> dict:
    found = {"stop": ranks(2, with_bad, [5], "stop"), "goes on": ranks(2, pretrain, "stop", "--bad-loss", "skip")}
    found["skip"] = ranks(2, with_bad, [4, 5, 6, 7], "skip", "--bad-loss", "skip")
    found["roll-back"] = ranks(2, with_bad, [5], "back", "--bad-loss", "roll-back")
    for name in ("skip", "back"):
        found[f"{name} events"] = ModelFolder(name).events
    found["card"] = ModelFolder("back").card["left_out_batches"]
    found["losses of stop"] = len(losses("stop"))
    return found


def test_a_loss_that_is_no_number_on_one_rank_stops_skips_or_rolls_back_all(tmp_path):
    found = forked("bad_losses", tmp_path)
    assert found["stop"] == [2, 2] and found["goes on"] == [0, 0] and found["losses of stop"] == 10
    assert "the loss became nan at step 5, on rank 1 (rows [" in found["said"] and "as at the 3 before" in found["said"]
    assert found["skip"] == [2, 2] and found["roll-back"] == [0, 0]
    skipped = [e for e in found["skip events"] if "bad_loss" in e]
    assert (
        [e["step"] for e in skipped] == [4, 5, 6, 7]
        and list(skipped[0]["rows"]) == ["1"]
        and len(skipped[0]["rows"]["1"]) == 3
    )
    steps = [e["step"] for e in found["back events"] if "loss" in e]
    assert found["card"] == [[0, 6]] and sorted(set(steps)) == list(range(10)), (
        "back to the start, and on behind the bad batch"
    )


# ── stopped, and gone on with at another number of processes ────────────────────────────────────────────────────────


def stopped_at(step: int, name: str) -> None:
    """SIGTERM to one of the ranks."""
    from nanoghost.data.batches import Batches

    at = Batches.at

    def signalling(self, number):
        if number == step and distributed.rank_and_world_size()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return at(self, number)

    Batches.at = signalling
    pretrain(name)


def stops() -> dict:
    codes = [ranks(1, pretrain, "alone"), ranks(3, stopped_at, 5, "stopped")]
    saved = (ModelFolder("stopped").path / "state" / "latest").read_text()
    codes += [ranks(2, stopped_at, 7, "stopped"), ranks(1, pretrain, "stopped")]
    return {"codes": codes, "saved": saved} | {
        name: [losses(name)[i] for i in range(10)] for name in ("alone", "stopped")
    }


def test_sigterm_to_one_rank_stops_all_with_0_and_others_go_on(tmp_path):
    found = forked("stops", tmp_path)
    assert found["codes"] == [[0], [0, 0, 0], [0, 0], [0]]
    assert found["saved"].strip() == "00000005" and "stopped is saved at step 7 of 10" in found["said"]
    assert found["stopped"] == pytest.approx(found["alone"], rel=1e-5)


# ── a hang ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hanging(name: str) -> None:
    from nanoghost.data.batches import Batches

    at = Batches.at

    def sleepy(self, number):
        if number == 3 and distributed.rank_and_world_size()[0] == 1:
            time.sleep(600)
        return at(self, number)

    Batches.at = sleepy
    pretrain(name, "--hang-minutes", 0.1)


def hangs() -> dict:
    start = time.time()
    codes = ranks(2, hanging, "hung")
    folder = ModelFolder("hung").path
    return {
        "codes": codes,
        "seconds": time.time() - start,
        "stacks": [(folder / f"stacks-rank-{r}.txt").read_text() for r in range(2)],
    }


def test_a_hang_ends_with_a_stack_dump_of_every_rank(tmp_path):
    found = forked("hangs", tmp_path)
    assert found["codes"] == [1, 1] and found["seconds"] < 300
    waiting, sleeping = found["stacks"]
    assert "in sleepy" in sleeping and "in all_reduce" in waiting and "in ready" in waiting


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_short_of_memory_at_the_start_it_takes_smaller_bites_and_learns_the_same(
    nanoghost, toy_file, monkeypatch, stage
):
    """With more than two rows in a pass it asks the allocator for more than there is, when it has left some gradients already."""
    monkeypatch.setattr(hardware, "cpu_dtype", lambda flags: torch.float32)
    assert nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 3, *TOY)[0] == 0
    words = {"pretrain": ("--data", toy_file, *TOY), "sft": ("toy", "--lessons", 100, "--batch", 6)}[stage]
    assert nanoghost(stage, *words, "--name", "toy-enough", "--steps", 3)[0] == 0
    module = importlib.import_module(f"nanoghost.train.{stage}")
    step = module.train_step

    def hungry(model, *batch_and_rows):
        loss = step(model, *batch_and_rows)
        return torch.empty(2**50 if batch_and_rows[-1] > 2 else 0).sum().item() + loss

    monkeypatch.setattr(module, "train_step", hungry)
    code, _, err = nanoghost(stage, *words, "--name", "toy-little", "--steps", 3)
    assert code == 0 and "2 rows go through the model at once instead of" in err, err
    little, enough = (
        [e["loss"] for e in ModelFolder(n).events if e["stage"] == stage and "loss" in e]
        for n in ("toy-little", "toy-enough")
    )
    assert len(little) == 3 and little == pytest.approx(enough, rel=1e-5)


# ── damaged text ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_part_of_a_large_text_is_named_and_never_learned(nanoghost, toy_file, home, monkeypatch):
    from nanoghost.data import block_checksums, shards

    monkeypatch.setattr(shards, "CHECKED_BYTES", 1)
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
    assert code == 2 and str(path) in line and f"bytes {start} to {start + 1024}" in line
    learned = losses("damaged")
    assert 0 < len(learned) < 60 and all(losses("whole")[step] == loss for step, loss in learned.items())


def test_blocks_are_read_once_and_all_that_are_touched(tmp_path, monkeypatch):
    from nanoghost.data import block_checksums

    monkeypatch.setattr(block_checksums, "BLOCK", 8)
    path = tmp_path / "train.bin"
    np.arange(40, dtype="<u2").tofile(path)  # ten blocks of four tokens
    check = block_checksums.Blocks(path, block_checksums.sums_of(path, 1)["blocks"], 2)
    check.check(np.array([2, 11]), 5)
    assert np.flatnonzero(check.known).tolist() == [0, 1, 2, 3]
    assert "blocks" not in block_checksums.sums_of(path, 1000)


COMMON = ["pretrain", "--data", "notes.txt", "--steps", "120", *TOY, "--checkpoint-seconds", "0.2"]


# ── killed under torchrun ───────────────────────────────────────────────────────────────────────────────────────────


def children(parent: int) -> dict[int, int]:
    """Processes of the ranks that a torchrun has started: rank -> id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v)
                found[int(variables["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_rank_that_is_killed_is_noticed_and_torchrun_goes_on_with_the_same_losses(tmp_path):
    from tests.conftest import toy_text

    (tmp_path / "notes.txt").write_text(toy_text(400))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
                "-m", "nanoghost"]  # fmt: skip
    process = subprocess.Popen(
        [*torchrun, *COMMON, "--name", "killed", "--force"],
        cwd=tmp_path,
        stderr=open(tmp_path / "said", "w"),  # noqa: SIM115
    )
    folder = ModelFolder("killed")
    while not list((folder.path / "state").glob("*/manifest.json")):
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)
    before = children(process.pid)
    os.kill(before[1], signal.SIGKILL)
    start = time.time()
    while Path(f"/proc/{before[0]}").exists() and time.time() - start < 20:
        time.sleep(0.02)
    noticed = time.time() - start
    assert noticed < 10, "the other rank has left"
    assert process.wait(timeout=400) == 0, (tmp_path / "said").read_text()
    print(f"noticed after {noticed:.1f} s")
    lines = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert sum(e["step"] == 0 and "loss" in e for e in lines) == 1, "it did not begin anew, in spite of --force"
    (tmp_path / "home").mkdir(exist_ok=True)
    assert forked("undisturbed", tmp_path)["losses"] == list(losses("killed").values())


def undisturbed() -> dict:
    codes_of(fork_ranks(2, cli.main, [*map(str, COMMON), "--name", "undisturbed"]))
    return {"losses": list(losses("undisturbed").values())}
