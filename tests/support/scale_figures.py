"""Measures the figures of docs/scale.md: python -m tests.support.scale_figures [NAME ...]

Names: gloo, resume, checkpoints, processes, weak. Each takes minutes and needs an idle machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from nanoghost import distributed, hardware
from nanoghost.data.batches import Batches
from nanoghost.model.llama import Llama
from nanoghost.model.registry import config_for_depth
from nanoghost.optim.collectives import start_all_gather, start_reduce_scatter
from nanoghost.optim.optimizer import Optimizer
from nanoghost.train.checkpoints import Checkpoints
from nanoghost.train.hyperparameters import pretrain_groups
from nanoghost.train.pretrain import accumulate_gradients
from tests.support.ranks import codes_of, fork_ranks

TEN_MILLION = (
    "--arch llama --depth 5 --vocab-size 5632 --compile off".split()
)  # flags of a model of ten million parameters
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def pretrain(name: str, *words: str, processes: int = 1, **environment: str) -> dict:
    """Figures of a run."""
    start = [sys.executable, *(TORCHRUN if processes > 1 else []), "-m", "nanoghost"]
    command = [*start, "pretrain", "--name", name, *words, "--json", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def fastest(words: list[str], batch_of: dict[int, int], steps: int, **environment: str) -> tuple[dict, ...]:
    """For each number of processes the figures of the faster of two runs; the runs alternate.

    `batch_of`: number of processes -> rows in a step. "speed": tokens per second over the whole run.
    """
    best: dict[int, dict] = {}
    for _ in range(2):
        for processes, batch in batch_of.items():
            sizes = ["--batch", str(batch), "--micro-batch", "16", "--steps", str(steps)]
            run = pretrain(f"p{processes}", *words, *sizes, processes=processes, **environment)
            run["speed"] = run["tokens"] / run["seconds"]
            if processes not in best or run["speed"] > best[processes]["speed"]:
                best[processes] = run
    return tuple(best.values())


def processes() -> None:
    """Tokens per second of one process with two threads, and of two processes with one thread each."""
    ghost = ["--depth", "4", "--compile", "off"]
    for model, words, batch in (("llama", TEN_MILLION, 16), ("llama", TEN_MILLION, 64), ("ghost, depth 4", ghost, 16)):
        one, two = fastest(words, {1: batch, 2: batch}, steps=640 // batch)
        print(
            f"{model}, {one['parameters']:,} parameters, {batch} rows of 256: one process {one['speed']:,.0f} tokens/s,"
            f" two {two['speed']:,.0f}: {two['speed'] / one['speed']:.2f} times;"
            f" last loss {one['loss']:.4f} and {two['loss']:.4f}",
            flush=True,
        )


def weak() -> None:
    """Weak scaling: one process with one thread and 16 rows, two such processes with 32 rows."""
    one, two = fastest(TEN_MILLION, {1: 16, 2: 32}, steps=20, OMP_NUM_THREADS="1")
    print(
        f"16 rows of 256 per process: one {one['speed']:,.0f} tokens/s, two {two['speed']:,.0f}:"
        f" {two['speed'] / one['speed'] / 2:.0%} of twice as many"
    )


def checkpoints(seconds: float = 30.0, pairs: int = 4) -> None:
    """Cost of checkpoints: training for half a minute with a checkpoint and half a minute without, in turn."""
    hardware.prepare()
    torch.manual_seed(0)
    config = config_for_depth("llama", 5, 5632, 256)
    model = Llama(config).cast(hardware.compute_dtype())
    optimizer = Optimizer(model, pretrain_groups(config.width), hardware.compute_dtype())
    batches = Batches(np.random.default_rng(0).integers(5632, size=400_000).astype("u2"), 256, 16, 0)
    size = sum(t.numel() * t.element_size() for t in optimizer.state().values())
    with tempfile.TemporaryDirectory(dir=os.environ.get("NANOGHOST_HOME")) as folder:
        writer = Checkpoints(Path(folder) / "state")
        step = 0
        speeds: dict[bool, list[float]] = {True: [], False: []}  # with a checkpoint, steps per second
        for block in range(2 * pairs + 1):  # the first block is warm-up
            with_checkpoint = block % 2 == 1
            start, steps, blocked = time.perf_counter(), 0, 0.0
            while time.perf_counter() - start < seconds:
                accumulate_gradients(model, *batches.at(step), 16)
                before = time.perf_counter()
                if with_checkpoint and steps == 0:
                    writer.start_save(step, optimizer.state(), {})
                elif not writer.is_saving:
                    writer.finish_save()
                blocked += time.perf_counter() - before
                optimizer.step(0.01)
                step += 1
                steps += 1
            writer.finish_save()
            if block:
                speeds[with_checkpoint].append(steps / (time.perf_counter() - start))
                if with_checkpoint:
                    print(f"  training was blocked for {blocked * 1e3:.0f} ms of {seconds:.0f} s", flush=True)
    costs = [1 - a / b for a, b in zip(speeds[True], speeds[False])]
    each = ", ".join(f"{cost:.2%}" for cost in costs)
    print(f"a checkpoint of {size / 1e6:.0f} MB every {seconds:.0f} s costs {median(costs):.2%} (each pair: {each})")


def time_collectives() -> None:
    """32 MB in fp32: gloo's operations, ours, and whether communication overlaps with matmuls on the same core."""
    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world_size = distributed.rank_and_world_size()
    flat, shard, whole = torch.randn(8_000_000), torch.empty(8_000_000 // world_size), torch.empty(8_000_000)
    a = torch.randn(1024, 1024)

    def matmuls():
        for _ in range(4):
            a @ a

    def overlapped():
        pending = start_reduce_scatter(flat, len(flat), world_size)
        matmuls()
        pending.wait()

    def milliseconds(work) -> float:
        times = []
        for _ in range(9):
            dist.barrier()
            start = time.perf_counter()
            work()
            dist.barrier()
            times.append(time.perf_counter() - start)
        return median(times) * 1e3

    operations = {
        "reduce-scatter of gloo": lambda: dist.reduce_scatter_single(shard, flat),
        "our reduce-scatter": lambda: start_reduce_scatter(flat, len(flat), world_size).wait(),
        "all-gather of gloo": lambda: dist.all_gather_single(whole, shard),
        "our all-gather": lambda: start_all_gather(whole, shard, rank, world_size).wait(),
        "matmuls": matmuls,
        "matmuls during our reduce-scatter": overlapped,
    }
    results = ", ".join(f"{name} {milliseconds(work):.0f} ms" for name, work in operations.items())
    if rank == 0:
        print(f"{world_size} processes: {results}", flush=True)


def gloo() -> None:
    for world_size in (2, 4):
        assert not any(codes_of(fork_ranks(world_size, time_collectives)))


def resume() -> None:
    """Seconds from the start of the process to its first step, at the start of a run and after a kill."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"NANOGHOST_HOME": home}
        words = ["--name", "r", *TEN_MILLION, "--steps", "499", "--checkpoint-seconds", "2", "--data", "plays"]
        command = [sys.executable, "-m", "nanoghost", "pretrain", *words]
        folder = Path(home) / "models" / "r"

        def logged_events() -> int:
            log = folder / "events.jsonl"
            return log.read_text().count("\n") if log.exists() else 0

        for kind in ("first start", "resume"):
            start, before = time.time(), logged_events()
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while logged_events() <= before:
                time.sleep(0.02)
            seconds = time.time() - start
            print(f"{kind} of a run of ten million parameters: {seconds:.1f} s to its first step", flush=True)
            while not (folder / "state" / "latest").exists():
                time.sleep(0.1)
            process.kill()
            process.wait()


if __name__ == "__main__":
    measurements = {  # gloo first: it forks, and must do so before torch computes anything in this process
        "gloo": gloo,
        "resume": resume,
        "checkpoints": checkpoints,
        "processes": processes,
        "weak": weak,
    }
    for name in sys.argv[1:] or measurements:
        measurements[name]()
