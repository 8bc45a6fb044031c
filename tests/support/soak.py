"""Long test of checkpoints: python -m tests.support.soak [KILLS] [STEPS]

A toy run of two ranks is killed again and again with SIGKILL: one rank or both at a random moment, or one rank
between two calls that touch the disk. Each restart must resume from the last checkpoint, and at the end the weights
must be identical, byte for byte, to those of an undisturbed run.
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
from nanoghost.train.fault_tolerance import StepGuard
from tests.support.ranks import codes_of, fork_ranks
from tests.support.toys import toy_text
from tests.test_checkpoints import die_at

COMMAND = (
    "pretrain --data notes.txt --arch llama --depth 2 --context 32 --batch 4 --vocab-size 300 --checkpoint-seconds 0"
)
SECONDS_TO_NOTICE = 5.0


def train(name: str, steps: int, rank_to_kill: int | None = None, boundary: int = 0) -> None:
    """Train, and write the step at which the run starts or resumes to the file `resumed`.

    `rank_to_kill` kills itself before its `boundary`-th disk call after that.
    """
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    original_resume = StepGuard.resume

    def recording_resume(self):
        start, saved = original_resume(self)
        if int(os.environ["RANK"]) == 0:
            Path("resumed").write_text(str(start))
        if rank_to_kill == int(os.environ["RANK"]):
            die_at(boundary)
        return start, saved

    StepGuard.resume = recording_resume
    cli.main([*COMMAND.split(), "--steps", str(steps), "--name", name])


def latest_checkpoint(name: str) -> int:
    path = ModelFolder(name).path / "state" / "latest"
    return int(path.read_text()) if path.exists() else 0


def wait_for(processes: list[int]) -> list[int]:
    """Exit codes. Once a process has died, the others are killed after a while, as torchrun does: ranks that have not
    yet connected cannot notice the death of another."""
    codes: dict[int, int] = {}
    first_death = None
    while len(codes) < len(processes):
        for process in set(processes) - set(codes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process] and first_death is None:
                    first_death = time.time()
            elif first_death and time.time() - first_death > SECONDS_TO_NOTICE:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


def run_and_kill(name: str, steps: int, rng: random.Random) -> str | None:
    """What was killed, or None if the run finished before."""
    Path("resumed").unlink(missing_ok=True)
    expected_start = latest_checkpoint(name)
    target = rng.choice(["rank", "job", "write", "write"])
    if target == "write":
        processes = fork_ranks(2, train, name, steps, rng.randrange(2), int(10 ** rng.uniform(0, 2.5)))
    else:
        processes = fork_ranks(2, train, name, steps)
        kill_time = time.time() + rng.uniform(0.0, 0.4)
        while time.time() < kill_time or (not Path("resumed").exists() and rng.random() < 0.999):
            time.sleep(0.005)  # rarely the run is killed while it starts
        for process in processes if target == "job" else [rng.choice(processes)]:
            os.kill(process, signal.SIGKILL)
    codes = wait_for(processes)
    if Path("resumed").exists():
        assert int(Path("resumed").read_text()) == expected_start, "it did not resume from the last checkpoint"
    if codes == [0, 0]:
        return None
    assert -signal.SIGKILL in codes, codes
    return target


def main(kills: int = 200, steps: int = 400) -> None:
    rng = random.Random(0)
    killed: dict[str, int] = {}  # what was killed -> how often
    finished_runs = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["NANOGHOST_HOME"] = folder
        Path("notes.txt").write_text(toy_text(300))
        assert codes_of(fork_ranks(2, train, "undisturbed", steps)) == [0, 0]
        expected = (ModelFolder("undisturbed").path / "model.safetensors").read_bytes()
        start = time.time()
        while sum(killed.values()) < kills or not finished_runs:
            name = f"killed-{finished_runs}"
            target = None
            if sum(killed.values()) < kills:
                target = run_and_kill(name, steps, rng)
            else:
                assert codes_of(fork_ranks(2, train, name, steps)) == [0, 0]
            if target is None:
                weights = (ModelFolder(name).path / "model.safetensors").read_bytes()
                assert weights == expected, "other weights than without kills"
                finished_runs += 1
                continue
            killed[target] = killed.get(target, 0) + 1
            count = sum(killed.values())
            if count % 20 == 0:
                seconds, step = time.time() - start, latest_checkpoint(name)
                print(f"{count} kills, {seconds:.0f} s, step {step} of run {finished_runs + 1}", flush=True)
    print(
        f"{sum(killed.values())} kills ({killed}) in {finished_runs} runs of {steps} steps: the weights are identical"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
