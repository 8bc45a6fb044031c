"""Charts as SVG: small line charts inside report.html, and standalone figures of experiments.

No script, no external font. Charts of the report take their colors from the page's style sheet; standalone figures
carry their own, for light and dark pages.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

# -- line charts inside a page -----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 28  # margins around the plot area


def line_chart(
    title: str,
    lines: dict[str, list[Point]],
    x_label: str,
    level: tuple[str, float] | None = None,
    percent: bool = False,
) -> str:
    """An inline SVG with one line for each entry of `lines`; "" if there are no points.

    `level`: label and y of a dashed horizontal line. `percent`: the y axis goes from 0% to 100%.
    """
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    if level:
        ys.append(level[1])
    y0, y1 = (0.0, 1.0) if percent else y_range(ys)
    x0 = min(xs)
    x1 = max(max(xs), x0 + 1e-9)

    def to_pixels(x: float, y: float) -> Point:
        clipped = min(max(y, y0), y1)
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            TOP + (y1 - clipped) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>']
    for y in ticks(y0, y1):
        _, py = to_pixels(x0, y)
        label = f"{y:.0%}" if percent else f"{y:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py + 3.5:.1f}" text-anchor="end">{label}</text>')
    for x in ticks(x0, x1, 4):
        px, _ = to_pixels(x, y0)
        parts.append(f'<text class="tick" x="{px:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(x_label)}</text>')
    if level:
        name, y = level
        _, py = to_pixels(x0, y)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        x = WIDTH - RIGHT
        parts.append(f'<text class="tick" x="{x}" y="{py - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for i, (name, points) in enumerate(lines.items()):
        parts.append(f'<polyline class="line c{i}" points="{polyline_points(to_pixels(*point) for point in points)}"/>')
        if len(lines) > 1:
            x = LEFT + 8 + i * 120
            parts.append(f'<text class="legend c{i}" x="{x}" y="{TOP + 8}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def polyline_points(pixels: Iterable[Point]) -> str:
    """The attribute `points` of a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)


def y_range(ys: list[float]) -> Point:
    """(low, high) with a margin of 8%. With many values the highest 3% are cut off: the first losses are far above."""
    low, high = min(ys), max(ys)
    if len(ys) > 40:
        high = sorted(ys)[int(len(ys) * 0.97)]
    margin = (high - low) * 0.08 or 0.5
    return low - margin, high + margin


def running_median(points: list[Point], window: int = 9) -> list[Point]:
    """Smooth the y values: the loss of a single batch is noisy."""
    ys = [y for _, y in points]
    half = window // 2
    smooth = []
    for i, (x, _) in enumerate(points):
        neighbors = sorted(ys[max(0, i - half) : i + half + 1])
        smooth.append((x, neighbors[len(neighbors) // 2]))
    return smooth


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high."""
    raw_step = (high - low) / count
    power = 1.0
    while power > raw_step:
        power /= 10
    while power * 10 <= raw_step:
        power *= 10
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw_step)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(step * i, 10) for i in range(first, last + 1)]


# -- standalone figures ------------------------------------------------------------------------------------------------

STYLE = """text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600; font-size: 14px }
.bar, .dot.c0 { fill: #3b6ea8 }
.dot.c1 { fill: #b8572b } .dot.c2 { fill: #4f8a4f } .line { fill: none; stroke-width: 2 } .line.c0 { stroke: #3b6ea8 }
.line.c1 { stroke: #b8572b } .line.c2 { stroke: #4f8a4f } .noise { stroke: #333; stroke-width: 1.2 }
.one { stroke: #999; stroke-dasharray: 3 3 } .paper { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .paper { fill: #161a1f } .bar, .dot.c0 { fill: #6ea3dd }
.line.c0 { stroke: #6ea3dd } .noise { stroke: #eee } }"""

BAR_HEIGHT, LABEL_WIDTH, BAR_WIDTH, BAR_MARGIN = 20, 220, 300, 60  # of bar charts; the margin holds the figure
PANEL_WIDTH = LABEL_WIDTH + BAR_WIDTH + BAR_MARGIN
PANEL_HEAD = 60  # height of a panel without bars


def standalone_svg(width: int, height: int, parts: list[str]) -> str:
    """A file of its own, with a background and a style sheet."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    background = '<rect class="paper" width="100%" height="100%"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<style>{STYLE}</style>{background}{''.join(parts)}</svg>\n"
    )


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars on a logarithmic scale."""

    title: str
    values: dict[str, dict]
    """Label of a bar -> {"mean", "spread"}; a spread of None is not drawn."""
    low: float
    """The scale starts here, or at the smallest mean if that is smaller. Below 1 the values are factors: bars start at
    1 and go to either side."""
    number_format: str
    """Format of the mean, such as "{:.2f}"."""


def bar_charts(charts: list[BarChart], columns: int = 1) -> str:
    """A figure with a panel for each chart."""
    parts, top = [], 0
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        for i, chart in enumerate(row):
            parts.append(f'<g transform="translate({i * PANEL_WIDTH} {top})">{bars(chart)}</g>')
        top += PANEL_HEAD + BAR_HEIGHT * max(len(chart.values) for chart in row)
    return standalone_svg(min(columns, len(charts)) * PANEL_WIDTH, top, parts)


def bars(chart: BarChart) -> str:
    values = chart.values
    are_factors = chart.low < 1
    low = min(chart.low, *(v["mean"] for v in values.values())) * 0.98
    high = max(1.0 if are_factors else low, *(v["mean"] + (v["spread"] or 0.0) for v in values.values()))

    def to_pixels(value: float) -> float:
        fraction = math.log(value / low) / math.log(high / low)
        return LABEL_WIDTH + BAR_WIDTH * max(0.0, fraction)

    parts = [f'<text class="title" x="{LABEL_WIDTH}" y="24">{escape(chart.title)}</text>']
    start = to_pixels(1.0) if are_factors else LABEL_WIDTH
    for i, (name, v) in enumerate(values.items()):
        y, end = 40 + i * BAR_HEIGHT, to_pixels(v["mean"])
        spread = v["spread"] or 0.0
        error_low, error_high = to_pixels(max(low, v["mean"] - spread)), to_pixels(max(low, v["mean"] + spread))
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        size = f'width="{abs(end - start):.1f}" height="{BAR_HEIGHT - 5}"'
        parts.append(f'<rect class="bar" x="{min(start, end):.1f}" y="{y + 2}" {size}/>')
        middle = y + BAR_HEIGHT / 2
        parts.append(f'<line class="noise" x1="{error_low:.1f}" x2="{error_high:.1f}" y1="{middle}" y2="{middle}"/>')
        figure = chart.number_format.format(v["mean"])
        parts.append(f'<text x="{max(start, error_high) + 6:.1f}" y="{y + 13}">{figure}</text>')
    if are_factors:
        bottom = 44 + BAR_HEIGHT * len(values)
        parts.append(f'<line class="one" x1="{start:.1f}" x2="{start:.1f}" y1="34" y2="{bottom}"/>')
    return "".join(parts)


def log_x_line_chart(title: str, lines: dict[str, list[Point]], unit: str) -> str:
    """A standalone figure: a line through the points of each entry, with a logarithmic x axis in `unit`."""
    width, height, left, right, top, bottom = 640, 360, 56, 110, 40, 40
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = 0.05 * (max(ys) - min(ys)) or 0.05
    x0, x1, y0, y1 = min(xs) * 0.9, max(xs) * 1.25, min(ys) - margin, max(ys) + margin

    def to_pixels(x: float, y: float) -> Point:
        return (
            left + math.log(x / x0) / math.log(x1 / x0) * (width - left - right),
            top + (y1 - y) / (y1 - y0) * (height - top - bottom),
        )

    parts = [f'<text class="title" x="{left}" y="24">{escape(title)}</text>']
    for y in ticks(y0, y1):
        _, py = to_pixels(x0, y)
        parts.append(f'<line class="one" x1="{left}" x2="{width - 100}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    round_numbers = [n * 10**power for power in range(-1, 5) for n in (1, 2, 5)]
    for x in round_numbers:
        if x0 <= x <= x1:
            px, _ = to_pixels(x, y0)
            parts.append(f'<text x="{px:.1f}" y="{height - 16}" text-anchor="middle">{x:g} {unit}</text>')
    for i, (name, line) in enumerate(lines.items()):
        pixels = [to_pixels(*point) for point in sorted(line)]
        parts.append(f'<polyline class="line c{i}" points="{polyline_points(pixels)}"/>')
        parts += [f'<circle class="dot c{i}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in pixels]
        last_x, last_y = pixels[-1]
        parts.append(f'<text x="{last_x + 10:.1f}" y="{last_y + 4:.1f}">{escape(name)}</text>')
    return standalone_svg(width, height, parts)
