"""Tables and figures of `nanoghost lab ledger` (ablations.py): in the terminal, as Markdown, and as SVG."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.evals.svg import bar_charts
from nanoghost.home import write_atomic

NGRAM_BASELINE = "6-gram baseline (Kneser-Ney)"
SPREAD_NOTE = "± is the standard deviation over seeds."
NOISE_NOTE = (
    "Learning rates are chosen with a resolution of 1.6, with one seed and in shorter runs. That changes bits per byte"
    " by some thousandths: differences below 0.005 are not significant."
)
RUN_COLUMNS = ("tokens", "microseconds per token", "learning rate multiplier")


@dataclass
class LedgerFigures:
    """Figures of `nanoghost lab ledger`, each group by recipe name. Means and spreads are {"mean", "spread"}."""

    kneser_ney_bpb: float
    targets: list[float] = field(default_factory=list)
    """The two targets of the cumulative group, bits per byte."""
    cumulative: dict[str, dict] = field(default_factory=dict)
    leave_one_out: dict[str, dict] = field(default_factory=dict)
    alternatives: dict[str, dict] = field(default_factory=dict)
    longer_runs: dict[str, dict] = field(default_factory=dict)
    """The comparison of --steps."""


@dataclass(frozen=True)
class ReportTable:
    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(figures: LedgerFigures) -> list[ReportTable]:
    """A table for each group that was run."""
    baseline = f"{figures.kneser_ney_bpb:.3f}"
    result = []
    if figures.cumulative:
        result.append(cumulative_table(figures, baseline))
    for title, group in (
        ("Leave-one-out: today's recipe without", figures.leave_one_out),
        ("Alternatives: today's recipe with", figures.alternatives),
    ):
        if group:
            result.append(relative_table(title, group, baseline))
    if figures.longer_runs:
        result.append(longer_runs_table(figures.longer_runs, baseline))
    return result


def cumulative_table(figures: LedgerFigures, baseline: str) -> ReportTable:
    speedups = cumulative_speedups(figures.cumulative)
    log_total = sum(math.log(speedup) for speedup in speedups.values())
    rows = []
    for name, r in figures.cumulative.items():
        seconds = ["" if s is None else number(s, ".1f") for s in r["seconds"]]
        speedup, fraction = "", ""
        if name in speedups:
            speedup = f"{speedups[name]:.2f}"
            fraction = f"{math.log(speedups[name]) / log_total:.0%}"
        rows.append([name, *seconds, speedup, fraction, number(r["bpb"], ".3f"), *run_cells(r)])
    rows.append([NGRAM_BASELINE, *[""] * (2 + len(figures.targets)), baseline, "", "", ""])
    targets = [f"seconds to {target:.3f} bpb" for target in figures.targets]
    columns = ["added to the previous recipe", *targets, "speedup", "fraction of the log speedup", "bpb", *RUN_COLUMNS]
    return ReportTable("Cumulative", columns, rows)


def relative_table(title: str, group: dict[str, dict], baseline: str) -> ReportTable:
    rows = []
    for name, r in group.items():
        relative_time = number(r["relative_time"], ".2f", "too long to measure")
        rows.append([name, relative_time, number(r["bpb_difference"], "+.3f"), number(r["bpb"], ".3f"), *run_cells(r)])
    rows.append([NGRAM_BASELINE, "", "", baseline, "", "", ""])
    return ReportTable(title, ["", "relative time", "bpb difference", "bpb", *RUN_COLUMNS], rows)


def longer_runs_table(group: dict[str, dict], baseline: str) -> ReportTable:
    rows = []
    for name, r in group.items():
        microseconds = f"{r['seconds_per_token'] * 1e6:.0f}"
        rows.append([name, number(r["bpb_difference"], "+.4f"), number(r["bpb"], ".4f"), microseconds])
    rows.append([NGRAM_BASELINE, "", baseline, ""])
    return ReportTable("Longer runs", ["", "bpb difference", "validation bpb", "microseconds per token"], rows)


def run_cells(r: dict) -> tuple[str, str, str]:
    """Cells of RUN_COLUMNS."""
    return f"{r['length']:,}", f"{r['seconds_per_token'] * 1e6:.0f}", f"{r['lr_scale']:.2f}"


def cumulative_speedups(group: dict[str, dict]) -> dict[str, float]:
    """Speedup of each recipe over the previous one, to the later target that both reach; no entry without one."""
    speedups = {}
    for name, r in group.items():
        if r["previous"] not in group:
            continue
        pairs = zip(group[r["previous"]]["seconds"], r["seconds"])
        ratios = [before["mean"] / after["mean"] for before, after in pairs if before and after]
        if ratios:
            speedups[name] = ratios[-1]
    return speedups


def number(value: dict | None, number_format: str, missing: str = "over 45 s") -> str:
    if not value:
        return missing
    spread = "" if value["spread"] is None else f" ±{value['spread']:{number_format.removeprefix('+')}}"
    return f"{value['mean']:{number_format}}{spread}"


def summary(figures: LedgerFigures) -> list[str]:
    """Totals of complete groups, in sentences."""
    sentences = []
    names, speedups = list(figures.cumulative), cumulative_speedups(figures.cumulative)
    relative_times = [r["relative_time"]["mean"] for r in figures.leave_one_out.values() if r["relative_time"]]
    total = product = None
    if speedups and len(speedups) == len(names) - 1:
        total = math.prod(speedups.values())
        sentences.append(f"'{names[-1]}' is {total:.0f} times as fast as '{names[0]}'.")
    if relative_times and len(relative_times) == len(figures.leave_one_out):
        product = math.prod(relative_times)
        sentences.append(f"The product of the relative times without one part each is {product:.1f}.")
    if total and product:
        sentences.append(f"Its logarithm is {math.log(product) / math.log(total):.0%} of that of the total speedup.")
    return sentences


def print_tables(figures: LedgerFigures) -> None:
    console = Console(stderr=True)
    for table in tables(figures):
        rich_table = Table(*table.columns, title=table.title)
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
    for sentence in summary(figures):
        console.print(sentence, highlight=False)


def write_report(path: Path, figures: LedgerFigures, command: str) -> None:
    """Write the tables as Markdown, and a figure as an SVG of the same name."""
    parts = [
        "# Ledger: what each part of the recipe is worth",
        f"Made by `{command}`.",
        *summary(figures),
        SPREAD_NOTE if figures.longer_runs else f"{SPREAD_NOTE} {NOISE_NOTE}",
        f"![Bars of the same figures]({path.stem}.svg)",
    ]
    for table in tables(figures):
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{markdown}")
    write_atomic(path, "\n\n".join(parts) + "\n")
    write_atomic(path.with_suffix(".svg"), bar_charts(panels(figures), columns=2))


def panels(figures: LedgerFigures) -> list[tuple[str, dict[str, dict], float, str]]:
    """Bar charts: (title, values, start of the scale, number format)."""
    result = []
    for i, target in enumerate(figures.targets):
        seconds = {name: r["seconds"][i] for name, r in figures.cumulative.items() if r["seconds"][i]}
        if seconds:
            result.append((f"Seconds to {target:.2f} bits per byte", seconds, 1.0, "{:.1f}"))
    for group in (figures.leave_one_out, figures.alternatives):
        times = {name: r["relative_time"] for name, r in group.items() if r["relative_time"]}
        if times:
            result.append(("Time relative to today's recipe", times, 0.8, "{:.2f}"))
    if figures.longer_runs:
        bpbs = {name: r["bpb"] for name, r in figures.longer_runs.items()}
        result.append(("Bits per byte", bpbs, math.inf, "{:.4f}"))
    return result
