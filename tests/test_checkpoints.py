"""Checkpoints: a kill at any moment loses nothing that was complete, damage is detected, other numbers of ranks can
resume."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from nanoghost import distributed
from nanoghost.data.batches import Batches
from nanoghost.errors import UserError
from nanoghost.train.checkpoints import Checkpoints
from tests.support.ranks import codes_of, fork_ranks
from tests.support.toy_training import flat_parameters, toy_ghost, toy_optimizer, toy_tokens, train_steps


class FakeOptimizer:
    """Has a state in which every number is `value`, so that a mixture of two checkpoints would be noticed."""

    def __init__(self, value: float = -1.0, rows: int = 1000):
        self.tensors = {"bucket/master": torch.full((rows,), value), "time": torch.tensor(int(value))}
        self.buckets = {"bucket": self}
        self.first_row = distributed.rank_and_world_size()[0] * rows

    def state(self):
        return self.tensors

    def load_state(self, tensors):
        self.tensors = tensors

    @property
    def value(self) -> float:
        (value,) = set(self.tensors["bucket/master"].tolist())
        assert value == self.tensors["time"]
        return value


def save(checkpoints: Checkpoints, step: int) -> str:
    """Save a state full of `step`, whose score is best at step 20."""
    state = FakeOptimizer(step).state()
    checkpoints.start_save(step, state, {"seconds": 1.5 * step}, score=abs(step - 20))
    return checkpoints.finish_save()


def save_all(folder, *steps, **settings) -> None:
    checkpoints = Checkpoints(folder, **settings)
    for step in steps:
        assert save(checkpoints, step) == ""


def load(folder) -> tuple[int, list[str]]:
    """(step that a run would resume at, messages)."""
    messages, optimizer = [], FakeOptimizer()
    step, saved = Checkpoints(folder, log=messages.append).load(optimizer)
    if step:
        assert optimizer.value == step and saved == {"seconds": 1.5 * step}
    else:
        assert optimizer.value == -1 and saved == {}
    return step, messages


# -- killed at any moment --------------------------------------------------------------------------------------------

DISK_CALLS = {"open", "write", "flush", "fsync", "close", "replace", "unlink", "mkdir", "rmdir", "start"}


def die_at(boundary: int) -> None:
    """SIGKILL this process before its `boundary`-th call that may touch the disk, in any thread."""
    left = [boundary]

    def count_calls(frame, event, function):
        if event == "c_call" and function.__name__ in DISK_CALLS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count_calls)
    sys.setprofile(count_calls)


def save_30_and_40(folder, boundary: int) -> None:
    """The checkpoints of steps 10 and 20 exist already: 10 has to be removed."""
    distributed.init_distributed()
    checkpoints = Checkpoints(folder, keep_last=1)
    die_at(boundary)
    for step in (30, 40):
        save(checkpoints, step)
        (folder.parent / f"saved-{step}").touch()


def test_killed_at_every_write_boundary_the_run_resumes_from_the_last_good_checkpoint(tmp_path):
    """The process is killed before its first disk call, then in a new run before its second, and so on."""
    killed, boundary, resumed_at = True, 0, set()
    while killed:
        folder = tmp_path / f"{boundary}" / "state"
        save_all(folder, 10, 20)
        killed = any(codes_of(fork_ranks(1, save_30_and_40, folder, boundary)))
        step, messages = load(folder)
        assert not messages
        assert step >= 20, "a complete checkpoint was lost"
        for saved in (30, 40):
            if (folder.parent / f"saved-{saved}").exists():
                assert step >= saved
        save_all(folder, 50)  # what the killed process left does not get in the way
        assert load(folder) == (50, [])
        assert not list(folder.rglob("*.tmp"))
        resumed_at.add(step)
        boundary += 1
    assert boundary > 40
    assert resumed_at == {20, 30, 40}


def one_of_two_ranks_dies(folder) -> None:
    distributed.init_distributed()
    checkpoints = Checkpoints(folder)
    save(checkpoints, 10)
    if distributed.rank_and_world_size()[0] == 1:
        die_at(int(folder.name))
    save(checkpoints, 20)


def load_in_two_ranks(folder) -> None:
    distributed.init_distributed()
    step, messages = load(folder)
    assert not messages
    # killed at call 9, the second rank may have written its shard already, and the first one can complete the
    # checkpoint
    assert step == 10 or (step == 20 and folder.name == "9")


def kill_one_of_two_ranks() -> None:
    for boundary in ("2", "9"):
        folder = Path(os.environ["TOY"]) / boundary
        assert -signal.SIGKILL in codes_of(fork_ranks(2, one_of_two_ranks_dies, folder))
        assert codes_of(fork_ranks(2, load_in_two_ranks, folder)) == [0, 0]


def test_without_the_shard_of_every_rank_there_is_no_checkpoint(tmp_path):
    """In a new process: a process that forks must not have used torch's threads."""
    code = "import tests.test_checkpoints as t; t.kill_one_of_two_ranks()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TOY": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- damaged ---------------------------------------------------------------------------------------------------------


def flip_a_bit(folder):
    path = folder / "rank-0.safetensors"
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


def truncate_shard(folder):
    os.truncate(folder / "rank-0.safetensors", 100)


def delete_shard(folder):
    (folder / "rank-0.safetensors").unlink()


def change_format(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 1'))


def truncate_manifest(folder):
    os.truncate(folder / "manifest.json", 30)


DAMAGES = {  # damage, what the message says
    flip_a_bit: "checksum",
    truncate_shard: "checksum",
    delete_shard: "missing",
    change_format: "format 1",
    truncate_manifest: "manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(tmp_path, damage):
    save_all(tmp_path, 10, 20, keep_last=2)
    damage(tmp_path / "00000020")
    step, (message,) = load(tmp_path)
    assert step == 10
    for text in (DAMAGES[damage], "step 20", "resuming from step 10"):
        assert text in message
    save_all(tmp_path, 15)  # the run continues, and will come to step 20 again
    assert load(tmp_path) == (15, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_only_damaged_checkpoints_the_run_is_refused(tmp_path, damage):
    save_all(tmp_path, 10, 20, keep_last=2)
    damage(tmp_path / "00000010")
    damage(tmp_path / "00000020")
    with pytest.raises(UserError, match=f"{DAMAGES[damage]}.*--force"):
        load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_all(tmp_path, 10)
    other = FakeOptimizer()
    other.tensors["head/master"] = torch.zeros(3)
    with pytest.raises(UserError, match="another model"):
        Checkpoints(tmp_path).load(other)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
@pytest.mark.parametrize("filled_meanwhile", [False, True], ids=["seen-beforehand", "in-the-middle"])
def test_a_full_disk_is_reported_and_the_last_checkpoint_remains(tmp_path, monkeypatch, filled_meanwhile):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        messages = []
        save_all(tmp_path, 10)
        checkpoints = Checkpoints(tmp_path, log=messages.append)
        large = FakeOptimizer(20, rows=300_000)
        if filled_meanwhile:  # the free space is gone after it was checked
            monkeypatch.setattr("nanoghost.train.checkpoints.shutil.disk_usage", lambda path: os.statvfs_result)
            monkeypatch.setattr(os.statvfs_result, "free", 2**40, raising=False)
        for _ in range(2):
            checkpoints.start_save(20, large.state(), {})
            assert "No space left" in checkpoints.finish_save()
        assert "the last one is of step 10" in messages[0]
        assert not list(tmp_path.rglob("*.tmp"))
        assert load(tmp_path) == (10, [])
        checkpoints.start_save(20, large.state(), {})
        with pytest.raises(UserError, match="3 consecutive saves have failed"):
            checkpoints.finish_save()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# -- what is kept, and what is in it ---------------------------------------------------------------------------------


def test_the_best_the_last_and_every_nth_checkpoint_are_kept(tmp_path):
    save_all(tmp_path, *range(5, 60, 5), keep_last=2, keep_every=15)
    assert Checkpoints(tmp_path).steps() == [15, 20, 30, 45, 50, 55]  # 20 is the best
    assert (tmp_path / "latest").read_text() == "00000055\n"


def test_changes_after_the_start_of_a_save_are_not_in_the_checkpoint(tmp_path):
    tensors = FakeOptimizer(10, rows=3_000_000).state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.start_save(10, tensors, {})
    busy = checkpoints.is_saving
    tensors["bucket/master"].fill_(77)
    assert busy, "it is written while training continues"
    checkpoints.finish_save()
    loaded = FakeOptimizer(rows=3_000_000)
    Checkpoints(tmp_path).load(loaded)
    assert loaded.value == 10


def test_latest_is_written_after_the_manifest_and_the_manifest_after_the_shards(tmp_path):
    renamed = []

    def record_renames(event, arguments):  # an audit hook cannot be removed
        if recording and event == "os.rename":
            renamed.append(os.path.basename(os.fspath(arguments[1])))

    recording = True
    sys.addaudithook(record_renames)
    save_all(tmp_path, 10)
    recording = False
    assert renamed == ["rank-0.safetensors", "manifest.json", "latest"]


# -- saved with four ranks, resumed with two and with one -------------------------------------------------------------

AT, END = 10, 20


def train_up_to(folder: str, goal: int) -> None:
    """Train a toy model from the checkpoint in `folder`, if there is one, to step `goal`; save a checkpoint at step
    AT."""
    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world_size = distributed.rank_and_world_size()
    model = toy_ghost(1)
    optimizer = toy_optimizer(model, rank=rank, world_size=world_size)
    checkpoints = Checkpoints(Path(folder) / f"state-{AT}")
    start, _ = checkpoints.load(optimizer)
    losses = train_steps(model, optimizer, Batches(toy_tokens(), 16, 12, 0, rank, world_size), range(start, goal))
    if goal == AT:
        checkpoints.start_save(goal, optimizer.state(), {})
        checkpoints.finish_save()
    torch.save((losses, flat_parameters(model)), f"{folder}/{goal}-{world_size}-{rank}.pt")


def save_with_four_ranks_and_resume_with_two(folder: str) -> None:
    assert not any(codes_of(fork_ranks(4, train_up_to, folder, AT)))
    for world_size in (4, 2):
        assert not any(codes_of(fork_ranks(world_size, train_up_to, folder, END)))


def test_a_checkpoint_of_four_ranks_resumes_with_two_and_with_one(tmp_path):
    code = f"import tests.test_checkpoints as t; t.save_with_four_ranks_and_resume_with_two({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train_up_to(str(tmp_path), END)
    expected_losses, expected_weights = torch.load(tmp_path / f"{END}-4-0.pt")
    for world_size, rank in ((4, 3), (2, 0), (2, 1), (1, 0)):
        losses, weights = torch.load(tmp_path / f"{END}-{world_size}-{rank}.pt")
        assert len(losses) == END - AT
        assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5, atol=0)
        assert (weights - expected_weights).norm() < 1e-5 * expected_weights.norm()
