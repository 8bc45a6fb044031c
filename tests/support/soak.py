"""Long trials: python -m tests.support.soak [KILLS] [STEPS]. A toy run of two ranks is killed again and again; nothing of it may be lost.

Each life begins at the last checkpoint and ends by SIGKILL: of one rank or of both, at a random moment, or of one rank between two
calls that touch the disk. At the end the weights must be, to the byte, those of a run that nobody disturbed.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from nanoghost import cli
from nanoghost.home import ModelFolder
from tests.support.toys import toy_text
from tests.support.ranks import codes_of, fork_ranks
from tests.test_checkpoints import die_at

COMMAND = ["pretrain", "--data", "notes.txt", "--arch", "llama", "--depth", "2", "--context", "32", "--batch", "4", "--vocab-size", "300",
           "--checkpoint-seconds", "0", "--steps"]  # fmt: skip


def life(name: str, rank: int | None = None, boundary: int = 0) -> None:
    """Train, and note at which step it began; `rank` kills itself before its so many-th write after that."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    from nanoghost.train.run import Run

    resume = Run.resume

    def noting(self, optimizer):
        start, notes = resume(self, optimizer)
        if int(os.environ["RANK"]) == 0:
            Path("began").write_text(str(start))
        if rank == int(os.environ["RANK"]):
            die_at(boundary)
        return start, notes

    Run.resume = noting
    cli.main([*COMMAND, os.environ["STEPS"], "--name", name])


def latest(name: str) -> int:
    path = ModelFolder(name).path / "state" / "latest"
    return int(path.read_text()) if path.exists() else 0


def ends(processes: list[int], patience: float = 5.0) -> list[int]:
    """Exit codes. When one has died, those that do not notice are killed after a while, as torchrun does: before processes have
    found each other there is nothing to notice."""
    codes: dict[int, int] = {}
    died = None
    while len(codes) < len(processes):
        for process in set(processes) - set(codes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                died = died or (time.time() if codes[process] else None)
            elif died and time.time() - died > patience:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[p] for p in processes]


def one_kill(name: str, rng: random.Random) -> str | None:
    """What was killed, or None if the run came to its end."""
    Path("began").unlink(missing_ok=True)
    before = latest(name)
    kind = rng.choice(["rank", "job", "write", "write"])
    if kind == "write":
        processes = fork_ranks(2, life, name, rng.randrange(2), int(10 ** rng.uniform(0, 2.5)))
    else:
        processes = fork_ranks(2, life, name)
        wait = time.time() + rng.uniform(0.0, 0.4)
        while time.time() < wait or not Path("began").exists() and rng.random() < 0.999:  # seldom while it starts
            time.sleep(0.005)
        for process in processes if kind == "job" else [rng.choice(processes)]:
            os.kill(process, signal.SIGKILL)
    codes = ends(processes)
    if Path("began").exists():
        assert int(Path("began").read_text()) == before, "it went on elsewhere than at the last checkpoint"
    if codes == [0, 0]:
        return None
    assert -signal.SIGKILL in codes, codes
    return kind


def main(kills: int = 200, steps: int = 400) -> None:
    os.environ["STEPS"] = str(steps)
    rng, died, finished = random.Random(0), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["NANOGHOST_HOME"] = folder
        Path("notes.txt").write_text(toy_text(300))
        assert codes_of(fork_ranks(2, life, "undisturbed")) == [0, 0]
        expected = (ModelFolder("undisturbed").path / "model.safetensors").read_bytes()
        start = time.time()
        while sum(died.values()) < kills or not finished:
            name = f"killed-{finished}"
            kind = one_kill(name, rng) if sum(died.values()) < kills else codes_of(fork_ranks(2, life, name)) and None
            if kind:
                died[kind] = died.get(kind, 0) + 1
                if sum(died.values()) % 20 == 0:
                    print(
                        f"{sum(died.values())} kills, {time.time() - start:.0f} s, step {latest(name)} of run {finished + 1}",
                        flush=True,
                    )
                continue
            assert (ModelFolder(name).path / "model.safetensors").read_bytes() == expected, "other weights"
            finished += 1
    print(
        f"{sum(died.values())} kills ({died}) in {finished} runs of {steps} steps: the weights are those of the undisturbed run"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
