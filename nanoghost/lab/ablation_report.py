"""The report of `nanoghost lab ledger` (ablations.py): tables in the terminal and as Markdown, bar charts as SVG."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.evals.svg import BarChart, bar_charts
from nanoghost.home import write_atomic
from nanoghost.lab.ablation_runs import MAX_SECONDS

NGRAM_BASELINE = "6-gram baseline (Kneser-Ney)"
SPREAD_NOTE = "± is the standard deviation over seeds."
NOISE_NOTE = (
    "Learning rates are chosen in steps of a factor of 1.6, with one seed and in shorter runs. That changes bits per"
    " byte by a few thousandths: differences below 0.005 are not significant."
)
OUT_OF_REACH = f"over {MAX_SECONDS:.0f} s"
RUN_COLUMNS = ("tokens", "microseconds per token", "learning rate multiplier")


@dataclass
class LedgerFigures:
    """Figures of `nanoghost lab ledger`. A group maps the names of its recipes to their figures:

        bpb                 bits per byte at the end of the run *
        length              tokens of the run
        seconds_per_token
        lr_scale            multiplier on the learning rates
        previous            name of the recipe before, in the cumulative group
        seconds             seconds to each target, in the cumulative group *; None if it is not measured for the
                            recipe, {} if a run of MAX_SECONDS is too short to reach it
        bpb_difference      compared with today's recipe, in the other groups *
        relative_time       compared with today's recipe, in the other groups *; None if it is too long to measure

    * mean and spread: {"mean", "spread"}, where a single value has a spread of None.
    """

    kneser_ney_bpb: float
    """Bits per byte of the n-gram baseline."""
    targets: list[float] = field(default_factory=list)
    """The two targets of the cumulative group, bits per byte."""
    cumulative: dict[str, dict] = field(default_factory=dict)
    leave_one_out: dict[str, dict] = field(default_factory=dict)
    alternatives: dict[str, dict] = field(default_factory=dict)
    longer_runs: dict[str, dict] = field(default_factory=dict)
    """The comparison of --steps; it has neither lengths nor relative times."""


@dataclass(frozen=True)
class ReportTable:
    """A table of the report, as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(figures: LedgerFigures) -> list[ReportTable]:
    """A table for each group that was run."""
    baseline_bpb = f"{figures.kneser_ney_bpb:.3f}"
    report_tables = []
    if figures.cumulative:
        report_tables.append(cumulative_table(figures, baseline_bpb))
    for title, group in (
        ("Leave-one-out: today's recipe without one part", figures.leave_one_out),
        ("Alternatives: today's recipe with one change", figures.alternatives),
    ):
        if group:
            report_tables.append(relative_table(title, group, baseline_bpb))
    if figures.longer_runs:
        report_tables.append(longer_runs_table(figures.longer_runs, baseline_bpb))
    return report_tables


def cumulative_table(figures: LedgerFigures, baseline_bpb: str) -> ReportTable:
    speedups = cumulative_speedups(figures.cumulative)
    log_total = sum(math.log(speedup) for speedup in speedups.values())
    rows = []
    for name, recipe_figures in figures.cumulative.items():
        seconds = [target_cell(to_target) for to_target in recipe_figures["seconds"]]
        bpb = format_mean(recipe_figures["bpb"], ".3f")
        speedup, fraction = "", ""
        if name in speedups:
            speedup = f"{speedups[name]:.2f}"
            fraction = f"{math.log(speedups[name]) / log_total:.0%}"
        rows.append([name, *seconds, speedup, fraction, bpb, *run_cells(recipe_figures)])
    no_seconds = [""] * len(figures.targets)
    rows.append([NGRAM_BASELINE, *no_seconds, "", "", baseline_bpb, "", "", ""])
    targets = [f"seconds to {target:.3f} bpb" for target in figures.targets]
    columns = ["added to the previous recipe", *targets, "speedup", "fraction of the log speedup", "bpb", *RUN_COLUMNS]
    return ReportTable("Cumulative", columns, rows)


def target_cell(seconds: dict | None) -> str:
    """Seconds to a target; empty if it is not measured for the recipe."""
    if seconds is None:
        return ""
    return format_mean(seconds, ".1f") if seconds else OUT_OF_REACH


def relative_table(title: str, group: dict[str, dict], baseline_bpb: str) -> ReportTable:
    rows = []
    for name, recipe_figures in group.items():
        relative_time = "too long to measure"
        if recipe_figures["relative_time"]:
            relative_time = format_mean(recipe_figures["relative_time"], ".2f")
        difference = format_mean(recipe_figures["bpb_difference"], "+.3f")
        bpb = format_mean(recipe_figures["bpb"], ".3f")
        rows.append([name, relative_time, difference, bpb, *run_cells(recipe_figures)])
    rows.append([NGRAM_BASELINE, "", "", baseline_bpb, "", "", ""])
    return ReportTable(title, ["", "relative time", "bpb difference", "bpb", *RUN_COLUMNS], rows)


def longer_runs_table(group: dict[str, dict], baseline_bpb: str) -> ReportTable:
    rows = []
    for name, recipe_figures in group.items():
        difference = format_mean(recipe_figures["bpb_difference"], "+.4f")
        bpb = format_mean(recipe_figures["bpb"], ".4f")
        rows.append([name, difference, bpb, f"{recipe_figures['seconds_per_token'] * 1e6:.0f}"])
    rows.append([NGRAM_BASELINE, "", baseline_bpb, ""])
    return ReportTable("Longer runs", ["", "bpb difference", "validation bpb", "microseconds per token"], rows)


def run_cells(recipe_figures: dict) -> tuple[str, str, str]:
    """Cells of RUN_COLUMNS."""
    microseconds_per_token = recipe_figures["seconds_per_token"] * 1e6
    return f"{recipe_figures['length']:,}", f"{microseconds_per_token:.0f}", f"{recipe_figures['lr_scale']:.2f}"


def cumulative_speedups(group: dict[str, dict]) -> dict[str, float]:
    """Speedup of each recipe over the previous one, to the later target that both reach; no entry if there is none."""
    speedups = {}
    for name, recipe_figures in group.items():
        previous = group.get(recipe_figures["previous"])
        if not previous:
            continue
        pairs = zip(previous["seconds"], recipe_figures["seconds"])
        ratios = [before["mean"] / after["mean"] for before, after in pairs if before and after]
        if ratios:
            speedups[name] = ratios[-1]
    return speedups


def format_mean(value: dict, number_format: str) -> str:
    """A mean with its spread: "2.10 ±0.02"."""
    mean = f"{value['mean']:{number_format}}"
    if value["spread"] is None:
        return mean
    spread_format = number_format.removeprefix("+")
    return f"{mean} ±{value['spread']:{spread_format}}"


def summary(figures: LedgerFigures) -> list[str]:
    """Sentences about whole groups: the total speedup, and how much of it the parts of today's recipe explain."""
    sentences = []
    names = list(figures.cumulative)
    speedups = cumulative_speedups(figures.cumulative)
    relative_times = []
    for recipe_figures in figures.leave_one_out.values():
        if recipe_figures["relative_time"]:
            relative_times.append(recipe_figures["relative_time"]["mean"])
    total = product = None
    if speedups and len(speedups) == len(names) - 1:
        total = math.prod(speedups.values())
        sentences.append(f"'{names[-1]}' is {total:.0f} times as fast as '{names[0]}'.")
    if relative_times and len(relative_times) == len(figures.leave_one_out):
        product = math.prod(relative_times)
        sentences.append(f"The relative times of all leave-one-out recipes multiply to {product:.1f}.")
    if total and product:
        fraction = math.log(product) / math.log(total)
        sentences.append(f"The logarithm of this product is {fraction:.0%} of the logarithm of the total speedup.")
    return sentences


def print_tables(figures: LedgerFigures) -> None:
    """Print the tables and the summary to standard error."""
    console = Console(stderr=True)
    for table in tables(figures):
        rich_table = Table(*table.columns, title=table.title)
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
    for sentence in summary(figures):
        console.print(sentence, highlight=False)


def write_report(path: Path, figures: LedgerFigures, command: str) -> None:
    """Write the tables as Markdown, and bar charts as an SVG of the same name. `command`: the command line."""
    parts = [
        "# Ledger: what each part of the recipe is worth",
        f"Made by `{command}`.",
        *summary(figures),
        SPREAD_NOTE if figures.longer_runs else f"{SPREAD_NOTE} {NOISE_NOTE}",
        f"![Bar charts of the same figures]({path.stem}.svg)",
    ]
    for table in tables(figures):
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{markdown}")
    write_atomic(path, "\n\n".join(parts) + "\n")
    write_atomic(path.with_suffix(".svg"), bar_charts(charts(figures), columns=2))


def charts(figures: LedgerFigures) -> list[BarChart]:
    panels = []
    for i, target in enumerate(figures.targets):
        seconds = {name: row["seconds"][i] for name, row in figures.cumulative.items() if row["seconds"][i]}
        if seconds:
            panels.append(BarChart(f"Seconds to {target:.2f} bits per byte", seconds, low=1.0, number_format="{:.1f}"))
    for group in (figures.leave_one_out, figures.alternatives):
        times = {name: row["relative_time"] for name, row in group.items() if row["relative_time"]}
        if times:
            panels.append(BarChart("Time relative to today's recipe", times, low=0.8, number_format="{:.2f}"))
    if figures.longer_runs:
        bpbs = {name: row["bpb"] for name, row in figures.longer_runs.items()}
        panels.append(BarChart("Bits per byte", bpbs, low=math.inf, number_format="{:.4f}"))
    return panels
