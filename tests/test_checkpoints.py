"""Checkpoints: written beside the training, whole or not at all, whoever is killed wherever; and shared out anew among other
numbers of ranks."""

import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

from nanoghost import distributed
from nanoghost.data.batches import Batches
from nanoghost.errors import UserError
from nanoghost.train.checkpoints import Checkpoints
from tests.support.ranks import codes_of, fork_ranks
from tests.test_optimizer import everything, recipe, toy_ghost, toy_tokens, train


class State:
    """What stands for an optimizer where only the writing matters: one number, everywhere."""

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


def save(folder, *steps, **kept) -> None:
    checkpoints = Checkpoints(folder, **kept)
    for step in steps:
        checkpoints.save(step, State(step).state(), {"seconds": 1.5 * step}, score=abs(step - 20))
        assert checkpoints.settle() == ""


def loaded(folder) -> tuple[int, list[str]]:
    """The step that a run would go on at, and what it would say."""
    said, state = [], State()
    step, notes = Checkpoints(folder, say=said.append).load(state)
    assert state.value == step and notes == {"seconds": 1.5 * step} if step else (notes == {} and state.value == -1)
    return step, said


# ── killed anywhere ─────────────────────────────────────────────────────────────────────────────────────────────────

BOUNDARIES = {"open", "write", "flush", "fsync", "close", "replace", "unlink", "mkdir", "rmdir", "start"}


def die_at(boundary: int) -> None:
    """SIGKILL this process before its so many-th call that may touch the disk, in whatever thread."""
    left = [boundary]

    def watch(frame, event, function):
        if event == "c_call" and function.__name__ in BOUNDARIES:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)


def two_saves(folder, boundary: int | None) -> None:
    """Step 30 beside 10 and 20, and then 40: the oldest has to go."""
    distributed.init_distributed()
    checkpoints = Checkpoints(folder, keep_last=1)
    if boundary is not None:
        die_at(boundary)
    for step in (30, 40):
        checkpoints.save(step, State(step).state(), {"seconds": 1.5 * step}, score=abs(step - 20))
        checkpoints.settle()
        (folder.parent / f"settled-{step}").touch()


def test_killed_at_every_write_boundary_it_goes_on_from_the_last_good_one(tmp_path):
    died, boundary, went_on = True, 0, set()
    while died:
        folder = tmp_path / f"{boundary}" / "state"
        save(folder, 10, 20)
        died = any(codes_of(fork_ranks(1, two_saves, folder, boundary)))
        step, said = loaded(folder)
        assert not said and step >= 20, "what was whole stays so"
        for settled in (30, 40):
            assert not (folder.parent / f"settled-{settled}").exists() or step >= settled
        save(folder, 50)  # what the dead left behind is in nobody's way
        assert loaded(folder) == (50, []) and not list(folder.rglob("*.tmp"))
        went_on.add(step)
        boundary += 1
    assert boundary > 40 and went_on == {20, 30, 40}


def one_of_two_dies(folder) -> None:
    distributed.init_distributed()
    checkpoints = Checkpoints(folder)
    checkpoints.save(10, State(10).state(), {"seconds": 15.0})
    checkpoints.settle()
    if distributed.rank_and_world_size()[0] == 1:
        die_at(int(folder.name))
    checkpoints.save(20, State(20).state(), {"seconds": 30.0})
    checkpoints.settle()


def both(folder) -> None:
    distributed.init_distributed()
    step, said = loaded(folder)
    assert not said and (step == 10 or step == 20 and folder.name == "9")  # late enough, the other one could finish it


def test_a_shard_that_was_not_written_makes_no_checkpoint(tmp_path):
    """Run in processes of its own: what forks must not have used torch's threads."""
    code = "import tests.test_checkpoints as t; t.two_ranks_of_which_one_dies()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TOY": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def two_ranks_of_which_one_dies() -> None:
    from pathlib import Path

    for boundary in ("2", "9"):
        folder = Path(os.environ["TOY"]) / boundary
        assert -signal.SIGKILL in codes_of(fork_ranks(2, one_of_two_dies, folder))
        assert codes_of(fork_ranks(2, both, folder)) == [0, 0]


# ── damaged ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(folder):
    path = folder / "rank-0.safetensors"
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


def cut(folder):
    os.truncate(folder / "rank-0.safetensors", 100)


def lose(folder):
    (folder / "rank-0.safetensors").unlink()


def older(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))


def torn(folder):
    os.truncate(folder / "manifest.json", 30)


HOW = {flip: "checksum", cut: "checksum", lose: "missing", older: "format 1", torn: "manifest.json"}


@pytest.mark.parametrize("damage", HOW)
def test_a_damaged_one_is_said_and_the_one_before_it_used(tmp_path, damage):
    save(tmp_path, 10, 20, keep_last=2)
    damage(tmp_path / "00000020")
    step, (said,) = loaded(tmp_path)
    assert step == 10 and HOW[damage] in said and "step 20" in said and "going on from step 10" in said
    save(tmp_path, 15)  # the run goes on, and comes to step 20 once more
    assert loaded(tmp_path) == (15, [])
    damage(tmp_path / "00000015")
    if (tmp_path / "00000010").exists():
        damage(tmp_path / "00000010")
    with pytest.raises(UserError, match=f"{HOW[damage]}.*--force"):
        loaded(tmp_path)


def test_one_of_before_there_were_manifests_is_refused(tmp_path):
    (tmp_path / "checkpoint-0.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="older nanoghost"):
        loaded(tmp_path)


def test_one_of_another_model_is_refused(tmp_path):
    save(tmp_path, 10)
    other = State()
    other.tensors["head/master"] = torch.zeros(3)
    with pytest.raises(UserError, match="another model"):
        Checkpoints(tmp_path).load(other)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
@pytest.mark.parametrize("surprise", [False, True], ids=["seen-beforehand", "in-the-middle"])
def test_a_full_disk_is_said_and_the_last_good_one_stands(tmp_path, monkeypatch, surprise):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        said = []
        save(tmp_path, 10)
        checkpoints = Checkpoints(tmp_path, say=said.append)
        big = State(20, rows=300_000)
        if surprise:  # somebody else's file takes the room that was free a moment ago
            monkeypatch.setattr("nanoghost.train.checkpoints.shutil.disk_usage", lambda path: os.statvfs_result)
            monkeypatch.setattr(os.statvfs_result, "free", 2**40, raising=False)
        for _ in range(2):
            checkpoints.save(20, big.state(), {})
            assert "No space left" in checkpoints.settle()
        assert "step 10 stands" in said[0] and not list(tmp_path.rglob("*.tmp"))
        assert loaded(tmp_path) == (10, [])
        checkpoints.save(20, big.state(), {})
        with pytest.raises(UserError, match="in a row"):
            checkpoints.settle()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ── what is kept, and what is in it ─────────────────────────────────────────────────────────────────────────────────


def test_best_last_and_every_so_many_stay(tmp_path):
    save(tmp_path, *range(5, 60, 5), keep_last=2, keep_every=15)
    assert Checkpoints(tmp_path).steps() == [15, 20, 30, 45, 50, 55]  # 20 is the best
    assert (tmp_path / "latest").read_text() == "00000055\n"


def test_what_changes_after_a_save_is_not_in_it(tmp_path):
    tensors = State(10, rows=3_000_000).state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, tensors, {})
    busy = checkpoints.busy
    tensors["bucket/master"].fill_(77)
    assert busy, "it is written while training goes on"
    checkpoints.settle()
    found = State(rows=3_000_000)
    Checkpoints(tmp_path).load(found)
    assert found.value == 10


def test_it_moves_latest_only_when_all_is_on_disk(tmp_path):
    seen = []

    def watch(event, arguments):
        if watching and event == "os.rename":
            seen.append(os.path.basename(os.fspath(arguments[1])))

    watching = True
    sys.addaudithook(watch)
    save(tmp_path, 10)
    watching = False
    assert seen == ["rank-0.safetensors", "manifest.json", "latest"]


# ── save at four, resume at two and at one ──────────────────────────────────────────────────────────────────────────

AT, END = 10, 20


def some_steps(folder: str, goal: int) -> None:
    """Train a toy up to a step, going on from what `folder` holds, and save there."""
    from pathlib import Path

    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world = distributed.rank_and_world_size()
    model = toy_ghost(1)
    optimizer = recipe(model, rank=rank, world=world)
    checkpoints = Checkpoints(Path(folder) / f"state-{AT}")
    start, _ = checkpoints.load(optimizer)
    losses = train(model, optimizer, Batches(toy_tokens(), 16, 12, 0, rank, world), range(start, goal))
    if goal == AT:
        checkpoints.save(goal, optimizer.state(), {})
        checkpoints.settle()
    torch.save((losses, everything(model)), f"{folder}/{goal}-{world}-{rank}.pt")


def four_then_two(folder: str) -> None:
    assert not any(codes_of(fork_ranks(4, some_steps, folder, AT)))
    for world in (4, 2):
        assert not any(codes_of(fork_ranks(world, some_steps, folder, END)))


def test_saved_at_four_resumed_at_two_and_at_one(tmp_path):
    code = f"import tests.test_checkpoints as t; t.four_then_two({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    some_steps(str(tmp_path), END)
    expected, weights = torch.load(tmp_path / f"{END}-4-0.pt")
    for world, rank in ((4, 3), (2, 0), (2, 1), (1, 0)):
        losses, found = torch.load(tmp_path / f"{END}-{world}-{rank}.pt")
        assert len(losses) == END - AT
        assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
        assert (found - weights).norm() < 1e-5 * weights.norm()
