"""The ledger for eyes: tables, and a picture of charts of bars (for ledger.py)."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.evals.svg import bar_charts
from nanoghost.home import write_atomic

COUNTING = "counting bytes (Kneser-Ney of order 6)"
SPREAD = "± is the standard deviation over seeds."
NOISE = (
    "Learning rates are chosen between factors of 1.6, with one seed and in shorter runs, and that moves "
    "bits per byte by some thousandths, too: differences under 0.005 mean nothing."
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
                f"{math.log(factors[name]) / whole:.0%}" if name in factors else "", number(r["bpb"], ".3f"), *of_run(r),
            ]
            for name, r in climb.items()
        ]  # fmt: skip
        rows.append([COUNTING, *[""] * (2 + len(figures["marks"])), counted, "", "", ""])
        marks = (f"seconds to {mark:.3f} bpb" for mark in figures["marks"])
        heads = ["on top of the one before", *marks, "times as fast", "share", "bpb", *OF_RUN]
        found.append(("The ladder", heads, rows))
    for group, title in (("left_out", "Today's recipe without"), ("tried", "Today's recipe with")):
        rows = [
            [
                name,
                number(r["times"], ".2f", "off the scale"),
                number(r["more_bpb"], "+.3f"),
                number(r["bpb"], ".3f"),
                *of_run(r),
            ]
            for name, r in figures[group].items()
        ]
        if rows:
            rows.append([COUNTING, "", "", counted, "", "", ""])
            heads = ["", "times as long", "more bpb", "bpb", *OF_RUN]
            found.append((title, heads, rows))
    if again := figures["again"]:
        rows = [
            [name, number(r["more_bpb"], "+.4f"), number(r["bpb"], ".4f"), f"{r['rate'] * 1e6:.0f}"]
            for name, r in again.items()
        ]
        rows.append([COUNTING, "", counted, ""])
        found.append(("Asked again", ["", "more bpb", "validation bpb", "microseconds a token"], rows))
    return found


OF_RUN = ("after tokens", "microseconds a token", "factor on learning rates")


def of_run(r: dict) -> tuple[str, ...]:
    return f"{r['length']:,}", f"{r['rate'] * 1e6:.0f}", f"{r['scale']:.2f}"


def factors_of(climb: dict) -> dict[str, float]:
    """How many times as fast as the one before each rung is, to the later mark that both reach; of rungs without that one, none."""
    found = {}
    for name, after in climb.items():
        seconds = climb[after["before"]]["seconds"] if after["before"] in climb else ()
        both = [b["mean"] / a["mean"] for b, a in zip(seconds, after["seconds"]) if b and a]
        if both:
            found[name] = both[-1]
    return found


def number(value: dict | None, form: str, missing: str = "over 45 s") -> str:
    if not value:
        return missing
    spread = "" if value["spread"] is None else f" ±{value['spread']:{form.removeprefix('+')}}"
    return f"{value['mean']:{form}}{spread}"


def summary(figures: dict) -> list[str]:
    """What follows from the tables, in sentences."""
    climb, left, said = figures["ladder"], figures["left_out"], []
    factors, names = factors_of(climb), list(climb)
    times = [r["times"]["mean"] for r in left.values() if r["times"]]
    total = math.prod(factors.values()) if factors and len(factors) == len(names) - 1 else None
    product = math.prod(times) if times and len(times) == len(left) else None
    if total:
        said.append(f"From '{names[0]}' to '{names[-1]}': {total:.0f} times as fast.")
    if product:
        said.append(f"The product of what is lost by leaving out one part each: {product:.1f}.")
    if total and product:
        said.append(f"Counted in doublings, that product is {math.log(product) / math.log(total):.0%} of the total.")
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
    parts = [
        "# Ledger: what each part of the recipe is worth",
        f"Made by `{command}`.",
        *summary(figures),
        SPREAD if figures["again"] else f"{SPREAD} {NOISE}",
    ]
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
    for group, title in (("left_out", "Times as long as today's recipe"), ("tried", "Times as long as today's recipe")):
        times = {name: r["times"] for name, r in figures[group].items() if r["times"]}
        if times:
            charts.append((title, times, 0.8, "{:.2f}"))
    if again := figures["again"]:
        charts.append(("Bits per byte", {name: r["bpb"] for name, r in again.items()}, math.inf, "{:.4f}"))
    return bar_charts(charts, columns=2)
