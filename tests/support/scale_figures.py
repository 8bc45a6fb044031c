"""The figures of docs/scale.md: python -m tests.support.scale_figures [gloo] [resume] [checkpoints] [processes] [weak]. Minutes each, on an idle machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

SIZE = ["--arch", "llama", "--depth", "5", "--vocab-size", "5632", "--compile", "off"]  # ten million parameters
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def trained(name: str, *words: str, processes: int = 1, **environment: str) -> dict:
    start = [sys.executable, *(TORCHRUN if processes > 1 else []), "-m", "nanoghost"]
    command = [*start, "pretrain", "--name", name, *words, "--json", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def processes() -> None:
    """Tokens a second: one process with two threads, two processes with one each; in turn, the better of two."""
    ghost = ["--depth", "4", "--compile", "off"]
    for what, words, batch in (("llama", SIZE, 16), ("llama", SIZE, 64), ("ghost, depth 4", ghost, 16)):
        rates, losses = {1: [], 2: []}, {}
        for _ in range(2):
            for count in rates:
                sizes = ["--batch", str(batch), "--micro-batch", "16", "--steps", str(640 // batch)]
                figures = trained(f"p{count}", *words, *sizes, processes=count)
                rates[count].append(figures["tokens"] / figures["seconds"])
                losses[count] = figures["loss"]
        one, two = (max(r) for r in rates.values())
        print(f"{what}, {figures['parameters']:,} parameters, {batch} rows of 256: one process {one:,.0f} tokens/s, two {two:,.0f}: {two / one:.2f} times;"
              f" last loss {losses[1]:.4f} and {losses[2]:.4f}", flush=True)  # fmt: skip


def weak() -> None:
    """Tokens a second: one process with one thread and 16 rows, two of them with 32; in turn, the better of two."""
    rates = {1: [], 2: []}
    for _ in range(2):
        for count in rates:
            sizes = ["--batch", str(16 * count), "--micro-batch", "16", "--steps", "20"]
            figures = trained(f"w{count}", *SIZE, *sizes, processes=count, OMP_NUM_THREADS="1")
            rates[count].append(figures["tokens"] / figures["seconds"])
    one, two = (max(r) for r in rates.values())
    print(
        f"16 rows of 256 for each process: one {one:,.0f} tokens/s, two {two:,.0f}: {two / one / 2:.0%} of twice as many"
    )


def checkpoints(seconds: float = 30.0, pairs: int = 4) -> None:
    """Half a minute of training with a checkpoint and half a minute without, in turn."""
    import torch

    from nanoghost import hardware
    from nanoghost.data.batches import Batches
    from nanoghost.optim.optimizer import Optimizer
    from nanoghost.train.checkpoints import Checkpoints
    from nanoghost.train.hyperparameters import pretrain_groups, model_config
    from nanoghost.train.pretrain import accumulate_gradients

    hardware.prepare()
    torch.manual_seed(0)
    from nanoghost.model.llama import Llama

    config = model_config("llama", 5, 5632, 256)
    model = Llama(config).cast(hardware.compute_dtype())
    optimizer = Optimizer(model, pretrain_groups(config.width), hardware.compute_dtype())
    batches = Batches(np.random.default_rng(0).integers(5632, size=400_000).astype("u2"), 256, 16, 0)
    size = sum(t.numel() * t.element_size() for t in optimizer.state().values())
    with tempfile.TemporaryDirectory(dir=os.environ.get("NANOGHOST_HOME")) as folder:
        saving, step, rates = Checkpoints(Path(folder) / "state"), 0, {True: [], False: []}
        for block in range(2 * pairs + 1):
            with_one, start, count, stalled = block % 2 == 1, time.perf_counter(), 0, 0.0
            while time.perf_counter() - start < seconds:
                accumulate_gradients(model, *batches.at(step), 16)
                before = time.perf_counter()
                if with_one and not count:
                    saving.save(step, optimizer.state(), {})
                elif not saving.busy:
                    saving.settle()
                stalled += time.perf_counter() - before
                optimizer.step(0.01)
                step, count = step + 1, count + 1
            saving.settle()
            if block:
                rates[with_one].append(count / (time.perf_counter() - start))
                if with_one:
                    print(f"  training stood still for {stalled * 1e3:.0f} ms of {seconds:.0f} s", flush=True)
    shares = [1 - a / b for a, b in zip(rates[True], rates[False])]
    print(
        f"a checkpoint of {size / 1e6:.0f} MB every {seconds:.0f} s costs {median(shares):.2%} (each pair: {', '.join(f'{s:.2%}' for s in shares)})"
    )


def gloo_times() -> None:
    """32 MB in fp32: gloo's own operations, ours, and whether sending hides behind matrix products on the same core."""
    import torch
    import torch.distributed as dist

    from nanoghost import distributed
    from nanoghost.optim.collectives import all_gather, reduce_scatter

    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world = distributed.rank_and_world_size()
    flat, shard, whole = torch.randn(8_000_000), torch.empty(8_000_000 // world), torch.empty(8_000_000)
    a = torch.randn(1024, 1024)

    def products():
        for _ in range(4):
            a @ a

    def behind():
        arriving = reduce_scatter(flat, len(flat), world)
        products()
        arriving.wait()

    def timed(work) -> float:
        times = []
        for _ in range(9):
            dist.barrier()
            start = time.perf_counter()
            work()
            dist.barrier()
            times.append(time.perf_counter() - start)
        return median(times) * 1e3

    rows = {
        "reduce-scatter of gloo": lambda: dist.reduce_scatter_single(shard, flat),
        "ours": lambda: reduce_scatter(flat, len(flat), world).wait(),
        "all-gather of gloo": lambda: dist.all_gather_single(whole, shard),
        "ours ": lambda: all_gather(whole, shard, rank, world).wait(),
        "products": products,
        "products while ours is under way": behind,
    }
    found = {name: timed(work) for name, work in rows.items()}
    if rank == 0:
        print(
            f"{world} processes: {', '.join(f'{name.strip()} {ms:.0f} ms' for name, ms in found.items())}", flush=True
        )


def gloo() -> None:
    from tests.support.ranks import codes_of, fork_ranks

    for world in (2, 4):
        assert not any(codes_of(fork_ranks(world, gloo_times)))


def resume() -> None:
    """From the start of the process to the first step that it goes on with."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"NANOGHOST_HOME": home}
        command = [
            sys.executable,
            "-m",
            "nanoghost",
            "pretrain",
            "--name",
            "r",
            *SIZE,
            "--steps",
            "499",
            "--checkpoint-seconds",
            "2",
        ]
        folder = Path(home) / "models" / "r"
        for kind in ("first start", "resume"):
            start = time.time()
            process = subprocess.Popen([*command, "--data", "plays"], env=environment, stderr=subprocess.DEVNULL)
            before = (folder / "events.jsonl").read_text().count("\n") if (folder / "events.jsonl").exists() else 0
            while not (folder / "events.jsonl").exists() or (folder / "events.jsonl").read_text().count("\n") <= before:
                time.sleep(0.02)
            print(
                f"{kind} of a run of ten million parameters: {time.time() - start:.1f} s to its first step", flush=True
            )
            while not (folder / "state" / "latest").exists():
                time.sleep(0.1)
            process.kill()
            process.wait()


if __name__ == "__main__":
    parts = {
        "gloo": gloo,
        "resume": resume,
        "checkpoints": checkpoints,
        "processes": processes,
        "weak": weak,
    }  # what forks comes first
    for part in sys.argv[1:] or parts:
        parts[part]()
