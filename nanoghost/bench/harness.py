"""The harness of the benchmarks: texts, limits of the machine, baselines, measuring in turn, and the table of results.

All systems run once in each round, so that a slow phase of the machine affects all of them. A figure is the median over
the rounds.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.data.registry import open_data_source
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder

BASELINE_MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "trl": "trl"}


@dataclass(frozen=True)
class MachineLimits:
    """Measured peak speeds of this machine."""

    dtype: str
    """Compute dtype, in which the matmul speed is measured."""
    matrix_gflops_per_second: float
    bandwidth_gb_per_second: float

    @property
    def flops_per_second(self) -> float:
        return self.matrix_gflops_per_second * 1e9

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth_gb_per_second * 1e9


@dataclass(frozen=True)
class Workload:
    """Something to measure; one row of the table."""

    system: str
    """nanoghost, or a baseline."""
    name: str
    """What is computed, such as "decode"."""
    streams: int
    """Number of sequences, rows or rollouts at once."""
    run: Callable[[], float]
    """Does the work once and returns its throughput."""
    limit: float | None = None
    """Highest throughput that the machine allows, if known."""


def validation_texts(tokenizer, count: int, tokens: int) -> list[list[int]]:
    """`count` different texts of `tokens` tokens from the validation plays."""
    ids = []
    for document in open_data_source("plays").documents():
        if document.split == "val":
            ids += tokenizer.encode(document.text)
    if count * tokens > len(ids):
        raise UserError(f"the validation plays have {len(ids)} tokens, too few for {count} texts of {tokens}")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def measure_limits() -> MachineLimits:
    """Measure the matmul speed and the memory bandwidth; takes seconds."""
    dtype = hardware.compute_dtype()
    return MachineLimits(
        str(dtype).removeprefix("torch."),
        round(hardware.matmul_gflops_per_second(dtype), 1),
        round(hardware.bandwidth_gb_per_second(), 1),
    )


def requested_baselines(
    against: str, folder: ModelFolder, available: list[str], modules: Iterable[str] = ()
) -> list[str]:
    """The names in the comma-separated list of --against. `modules`: Python modules that they need besides their own.

    Raises UserError if a name is unknown, a module is not installed, or the baselines cannot run the model.
    """
    names = [name for name in against.split(",") if name]
    if names and (folder.card.arch == "ghost" or "@" in folder.name):
        raise UserError(f"--against needs a complete model of the Llama family: only nanoghost can run '{folder.name}'")
    for name in names:
        if name not in available:
            raise UserError(f"--against accepts {' and '.join(available)}, not '{name}'")
        for module in (BASELINE_MODULES[name], *modules):
            if not importlib.util.find_spec(module):
                extra = "trl" if name == "trl" else "parity"
                raise UserError(f"{module} is not installed: pip install 'nanoghost[{extra}]'")
    return names


def measure(workloads: list[Workload], rounds: int, unit: str = "") -> list[list[float]]:
    """The throughputs of each workload: all run in turn, once to warm up and then `rounds` times.

    Each is printed to standard error as it is measured.
    """
    throughputs = [[] for _ in workloads]
    for round_index in range(rounds + 1):
        label = f"round {round_index} of {rounds}" if round_index else "warm-up"
        for workload, values in zip(workloads, throughputs):
            value = workload.run()
            report_progress(f"{label}: {workload.system}, {workload.name}, {workload.streams}: {value:,.1f} {unit}")
            if round_index > 0:
                values.append(value)
    return throughputs


def report_progress(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def measure_and_report(
    workloads: list[Workload], rounds: int, as_json: bool, limits: MachineLimits | None = None, unit: str = "tokens/s"
) -> list[dict]:
    """Measure the workloads and print the table, also as JSON if `as_json`. Returns the rows.

    `unit`: unit of the throughputs, ".../s" or ".../min".
    """
    key = unit.replace("/s", "_per_second").replace("/min", "_per_minute")
    rows = []
    for workload, values in zip(workloads, measure(workloads, rounds, unit)):
        median = statistics.median(values)
        row = {"system": workload.system, "workload": workload.name, "streams": workload.streams}
        row |= {key: round(median, 1), "lowest": round(min(values), 1), "highest": round(max(values), 1)}
        if workload.limit is not None:
            row |= {"limit": round(workload.limit, 1), "fraction": round(median / workload.limit, 3)}
        rows.append(row)
    print_table(rows, {"streams": "streams", unit: key, "min": "lowest", "max": "highest"})
    if limits:
        Console(stderr=True).print(
            f"limits of this machine: {limits.matrix_gflops_per_second:.0f} GFLOP/s in {limits.dtype}, twice that in 8"
            f" bits; {limits.bandwidth_gb_per_second:.0f} GB/s"
        )
    if as_json:
        print(json.dumps({"limits": asdict(limits) if limits else {}, "rows": rows}))
    return rows


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """`columns`: title of each column -> key of its figures in a row."""
    if "limit" in rows[0]:
        columns = columns | {"limit": "limit", "of limit": "fraction"}
    table = Table("system", "workload")
    for title in columns:
        table.add_column(title, justify="right")
    for row in rows:
        figures = [f"{row[key]:.0%}" if key == "fraction" else f"{row[key]:,.0f}" for key in columns.values()]
        table.add_row(row["system"], row["workload"], *figures)
    Console(stderr=True).print(table)
