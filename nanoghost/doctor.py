"""`nanoghost doctor`: what this computer does well, measured, and what training makes of it, in plain words."""

import json
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nanoghost import machine
from nanoghost.errors import UserError


def describe() -> dict:
    """Facts that cost nothing to find out, ready for JSON (they go into `card.json`)."""
    rank, world_size = machine.ranks()
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": machine.cores(),
        "memory_gb": machine.memory_gb(),
        "instruction_sets": machine.instruction_sets(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(machine.device()),
        "gpu": torch.cuda.get_device_name(machine.device()) if machine.device().type == "cuda" else None,
        "dtype": str(machine.compute_dtype()).removeprefix("torch."),
        "threads": machine.threads(),
        "rank": rank,
        "world_size": world_size,
        "compiler": machine.has_compiler(),
    }


def compile_decision(asked: str, minutes: float | None) -> dict:
    """Compiling costs about a minute on two cores and makes a step about a fifth faster."""
    if asked == "off":
        return {"on": False, "reason": "as asked"}
    if not machine.has_compiler():
        if asked == "on":
            raise UserError("--compile on needs a C++ compiler (g++ or clang++, or the one that CXX names)")
        return {"on": False, "reason": "there is no C++ compiler"}
    if asked == "on":
        return {"on": True, "reason": "as asked"}
    pays = minutes is not None and minutes > 15
    return {"on": pays, "reason": "it pays in a run this long" if pays else "it would not pay in a run this short"}


def timed(work: Callable[[], object], on: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if on.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], on: torch.device, seconds: float) -> float:
    """Median time of one call, over `seconds` and at least three calls, after one to warm up."""
    timed(work, on)
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(work, on))
    return statistics.median(times)


def matmul_gflops_per_second(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Peak of square matrix products, the limit of training; `seconds` of measuring.

    The size grows until about twenty products fill the time: small ones measure the overhead instead.
    """
    on = machine.device()
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        a = torch.randn(size, size, device=on, dtype=dtype)
        work = partial(torch.mm, a, a, out=torch.empty_like(a))
        timed(work, on)
        if timed(work, on) > seconds / 20:
            break
    return 2 * size**3 / median_seconds(work, on, seconds) / 1e9


def bandwidth_gb_per_second(seconds: float = 1.0) -> float:
    """Rate of reading memory, the limit of decoding: the sum of 335 MB, more than most caches hold."""
    on = machine.device()
    x = torch.ones(80 * 2**20, device=on)
    return x.nbytes / median_seconds(x.sum, on, seconds) / 1e9


def measure(seconds: float = 1.0) -> dict:
    """`describe()` and three measured rates, about `seconds` each."""
    return describe() | {
        "bf16_gflops_per_second": round(matmul_gflops_per_second(torch.bfloat16, seconds), 1),
        "fp32_gflops_per_second": round(matmul_gflops_per_second(torch.float32, seconds), 1),
        "bandwidth_gb_per_second": round(bandwidth_gb_per_second(seconds), 1),
    }


# -- doctor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoctorSettings:
    json: bool = False
    """Print the figures as one JSON object, the last line on standard output."""


def explain(facts: dict) -> list[tuple[str, str, str]]:
    """Rows of (what, value, why) from the figures of `measure()`."""
    bf16, fp32 = facts["bf16_gflops_per_second"], facts["fp32_gflops_per_second"]
    measured = f"bfloat16 products run at {bf16 / fp32:.2g}x the rate of float32 here"
    if facts["dtype"] == "bfloat16":
        reason = f"the hardware multiplies bfloat16; master weights stay float32; {measured}"
    else:
        reason = f"no hardware support for bfloat16 that we rely on; {measured}"
    if facts["compiler"]:
        compiled = (
            "where it pays",
            f"{machine.compiler_name()} works: stages compile when the run is long enough to repay it",
        )
    else:
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        remedy = f"{machine.compiler_name()} must run and {headers} exist: install g++ and python3-dev, or set CXX"
        compiled = ("no", f"everything works, only slower; {remedy}")
    threads_reason = (
        f"{facts['cores']} physical cores may be used (hyperthreads add nothing); OMP_NUM_THREADS overrides"
    )
    memory = f"{facts['memory_gb']} GB memory; {', '.join(facts['instruction_sets']) or 'no vector extensions known'}"
    return [
        ("computer", facts["cpu"], memory),
        ("device", facts["device"], facts["gpu"] or "training runs here"),
        ("number format", facts["dtype"], reason),
        ("threads", str(facts["threads"]), threads_reason),
        ("torch.compile", *compiled),
        ("processes", str(facts["world_size"]), "torchrun starts more, on one node or several"),
        ("matrix products", f"{max(bf16, fp32):,.0f} GFLOP/s", f"limit of training (float32: {fp32:,.0f})"),
        ("memory", f"{facts['bandwidth_gb_per_second']:,.0f} GB/s", "limit of chatting: each token reads every weight"),
    ]


def command(settings: DoctorSettings, seconds: float = 1.0) -> None:
    """Say what training will use on this computer and why; `seconds` is the time for each measurement."""
    machine.prepare()
    facts = measure(seconds)
    table = Table(title=f"nanoghost on torch {facts['torch']}", title_justify="left")
    for column in ("what", "this computer", "why"):
        table.add_column(column)
    for row in explain(facts):
        table.add_row(*row)
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps(facts))
