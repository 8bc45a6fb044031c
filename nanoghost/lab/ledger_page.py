"""The ledger for eyes: tables, and a picture of two charts of bars (for ledger.py)."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.lab.pictures import GAP, LEFT, ROW, WIDE, bars, standalone
from nanoghost.runs import write_atomic

COUNTING = "counting bytes (Kneser-Ney of order 6)"
NOISE = (
    "± is the standard deviation over seeds. Learning rates are chosen between factors of 1.6, with one seed and in shorter runs: that alone "
    "moves bits per byte by up to 0.005, so smaller differences mean nothing."
)


def tables_of(figures: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(what it shows, heads, rows) of each group that was run."""
    found, climb, counted = [], figures["ladder"], f"{figures['counting']:.3f}"
    if climb:
        factors = factors_of(climb)
        whole = sum(map(math.log, factors.values()))
        rows = [
            [
                name, *("" if s is None else number(s, ".1f") for s in r["seconds"]), f"{factors[name]:.2f}" if name in factors else "",
                f"{math.log(factors[name]) / whole:.0%}" if name in factors else "", number(r["bpb"], ".3f"), f"{r['rate'] * 1e6:.0f}", f"{r['scale']:.2f}",
            ]
            for name, r in climb.items()
        ]  # fmt: skip
        rows.append([COUNTING, "", "", "", "", counted, "", ""])
        length = max(r["length"] for r in climb.values())
        marks = (f"seconds to {mark:.3f} bpb" for mark in figures["marks"])
        heads = ["on top of the one before", *marks, "times as fast", "share", f"bpb after {length:,} tokens", "microseconds a token", "learning rate"]
        found.append(("The ladder", heads, rows))
    for group, title in (("left_out", "Today's recipe without"), ("tried", "Today's recipe with")):
        rows = [
            [name, number(r["times"], ".2f"), number(r["more_bpb"], "+.3f"), number(r["bpb"], ".3f"), f"{r['rate'] * 1e6:.0f}", f"{r['scale']:.2f}"]
            for name, r in figures[group].items()
        ]
        if rows:
            rows.append([COUNTING, "", "", counted, "", ""])
            heads = ["", "times as long", "more bpb", "bpb", "microseconds a token", "learning rate"]
            found.append((title, heads, rows))
    if again := figures["again"]:
        rows = [[name, number(r["more_bpb"], "+.4f"), number(r["bpb"], ".4f"), f"{r['rate'] * 1e6:.0f}"] for name, r in again.items()]
        rows.append([COUNTING, "", counted, ""])
        found.append(("Asked again", ["", "more bpb", "validation bpb", "microseconds a token"], rows))
    return found


def factors_of(climb: dict) -> dict[str, float]:
    """How many times as fast as the one before each rung is, to the later mark that both reach."""
    found, rungs = {}, list(climb.items())
    for (_, before), (name, after) in zip(rungs, rungs[1:]):
        both = [b["mean"] / a["mean"] for b, a in zip(before["seconds"], after["seconds"]) if b and a]
        if both:
            found[name] = both[-1]
    return found


def number(value: dict | None, form: str) -> str:
    return f"{value['mean']:{form}} ±{value['spread']:{form.removeprefix('+')}}" if value else "over 45 s"


def summary(figures: dict) -> list[str]:
    """What follows from the tables, in sentences."""
    climb, left, said = figures["ladder"], figures["left_out"], []
    if factors := factors_of(climb):
        said.append(f"From the first rung to the last: {math.prod(factors.values()):.0f} times as fast.")
    times = [r["times"]["mean"] for r in left.values() if r["times"]]
    if times and len(times) == len(left):
        said.append(f"The product of what is lost by leaving out one part each: {math.prod(times):.1f}.")
    return said


def tell(figures: dict) -> None:
    for title, heads, rows in tables_of(figures):
        table = Table(*heads, title=title)
        for row in rows:
            table.add_row(*row)
        Console(stderr=True).print(table)
    for sentence in summary(figures):
        Console(stderr=True).print(sentence, highlight=False)


def write(path: Path, figures: dict, command: str) -> None:
    """The tables as Markdown, and the picture as an SVG of the same name beside it."""
    parts = ["# Ledger: what each part of the recipe is worth", f"Made by `{command}`.", *summary(figures), NOISE]
    parts.append(f"![Bars of the same figures]({path.stem}.svg)")
    for title, heads, rows in tables_of(figures):
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    write_atomic(path, "\n\n".join(parts) + "\n")
    write_atomic(path.with_suffix(".svg"), picture(figures))


def picture(figures: dict) -> str:
    charts = []
    for i, mark in enumerate(figures["marks"]):
        seconds = {name: r["seconds"][i] for name, r in figures["ladder"].items() if r["seconds"][i]}
        if seconds:
            charts.append((f"Seconds to {mark:.2f} bits per byte", seconds, 1.0, "{:.1f}"))
    for group, title in (("left_out", "Times as long"), ("tried", "Times as long")):
        times = {name: r["times"] for name, r in figures[group].items() if r["times"]}
        if times:
            charts.append((title, times, 0.8, "{:.2f}"))
    if again := figures["again"]:
        charts.append(("Bits per byte", {name: r["bpb"] for name, r in again.items()}, math.inf, "{:.4f}"))
    columns = [bars(LEFT + i * (LEFT + WIDE + GAP), *chart) for i, chart in enumerate(charts)]
    width = len(charts) * (LEFT + WIDE + GAP)
    height = 60 + ROW * max((len(chart[1]) for chart in charts), default=0)
    return standalone(width, height, columns)
