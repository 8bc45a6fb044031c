"""`nanoghost doctor`: what this computer does well, measured, and what training makes of it, in plain words."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost import hardware

# -- doctor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoctorSettings:
    json: bool = False
    """Print the figures as one JSON object, the last line on standard output."""


def explain(facts: dict) -> list[tuple[str, str, str]]:
    """Rows of (what, value, why) from the figures of `hardware.measure()`."""
    bf16, fp32 = facts["bf16_gflops_per_second"], facts["fp32_gflops_per_second"]
    measured = f"bfloat16 products run at {bf16 / fp32:.2g}x the rate of float32 here"
    if facts["dtype"] == "bfloat16":
        reason = f"the hardware multiplies bfloat16; master weights stay float32; {measured}"
    else:
        reason = f"no hardware support for bfloat16 that we rely on; {measured}"
    if facts["compiler"]:
        compiled = (
            "where it pays",
            f"{hardware.compiler_name()} works: stages compile when the run is long enough to repay it",
        )
    else:
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        remedy = f"{hardware.compiler_name()} must run and {headers} exist: install g++ and python3-dev, or set CXX"
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
    hardware.prepare()
    facts = hardware.measure(seconds)
    table = Table(title=f"nanoghost on torch {facts['torch']}", title_justify="left")
    for column in ("what", "this computer", "why"):
        table.add_column(column)
    for row in explain(facts):
        table.add_row(*row)
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps(facts))
