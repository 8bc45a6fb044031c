"""`nanoghost doctor`: what training and chat will use on this computer, and why; with measured speeds."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.progress import JsonFlag


@dataclass(frozen=True)
class DoctorSettings(JsonFlag):
    pass


def explain(facts: dict) -> list[tuple[str, str, str]]:
    """Rows (property, value, explanation) for `facts`, the result of `hardware.measure()`."""
    bf16, fp32 = facts["bf16_gflops_per_second"], facts["fp32_gflops_per_second"]
    ratio = f"bfloat16 matmuls run at {bf16 / fp32:.2g}x the speed of float32"
    if facts["dtype"] == "bfloat16":
        dtype_reason = f"supported by the hardware; master weights are float32; {ratio}"
    else:
        dtype_reason = f"the hardware has no bfloat16 instructions; {ratio}"
    compiler = hardware.compiler_name()
    if facts["compiler"]:
        compile_choice = "if worth it"
        compile_reason = f"{compiler} works: stages compile when the run is long enough to gain from it"
    else:
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        remedy = f"{compiler} must run and {headers} must exist: install g++ and python3-dev, or set CXX"
        compile_choice = "no"
        compile_reason = f"everything works, but slower; {remedy}"
    threads_reason = f"{facts['cores']} physical cores (hyperthreads add nothing); OMP_NUM_THREADS overrides it"
    bandwidth = f"{facts['bandwidth_gb_per_second']:,.0f} GB/s"
    instruction_sets = ", ".join(facts["instruction_sets"]) or "no vector extensions detected"
    return [
        ("computer", facts["cpu"], f"{facts['memory_gb']} GB memory; {instruction_sets}"),
        ("device", facts["device"], facts["gpu"] or "no GPU is used"),
        ("compute dtype", facts["dtype"], dtype_reason),
        ("threads", str(facts["threads"]), threads_reason),
        ("torch.compile", compile_choice, compile_reason),
        ("processes", str(facts["world_size"]), "torchrun starts more, on one or several nodes"),
        ("matmuls", f"{max(bf16, fp32):,.0f} GFLOP/s", f"limits training (float32: {fp32:,.0f} GFLOP/s)"),
        ("memory bandwidth", bandwidth, "limits chat: every weight is read for each token"),
    ]


def command(settings: DoctorSettings, seconds: float = 1.0) -> None:
    """Measure this computer and print the table; `seconds` is the time for each measurement."""
    hardware.prepare()
    facts = hardware.measure(seconds)
    table = Table(title=f"nanoghost on torch {facts['torch']}", title_justify="left")
    for column in ("", "this computer", "explanation"):
        table.add_column(column)
    for row in explain(facts):
        table.add_row(*row)
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps(facts))
