"""Pictures of experiments, as SVG files that bring their own colours, for light and dark pages."""

import math
from html import escape

from nanoghost.evals.charts import ticks

ROW, LEFT, WIDE, GAP = 20, 220, 300, 60
STYLE = """text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600; font-size: 14px }
.bar, .dot.c0 { fill: #3b6ea8 }
.dot.c1 { fill: #b8572b } .dot.c2 { fill: #4f8a4f } .line { fill: none; stroke-width: 2 } .line.c0 { stroke: #3b6ea8 }
.line.c1 { stroke: #b8572b } .line.c2 { stroke: #4f8a4f } .noise { stroke: #333; stroke-width: 1.2 } .one { stroke: #999; stroke-dasharray: 3 3 } .paper { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .paper { fill: #161a1f } .bar, .dot.c0 { fill: #6ea3dd } .line.c0 { stroke: #6ea3dd } .noise { stroke: #eee } }"""


def standalone(width: int, height: int, parts: list[str]) -> str:
    """An SVG that brings its own colours, for light and dark."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def bars(left: float, title: str, values: dict[str, dict], low: float, form: str) -> str:
    """Horizontal bars on a logarithmic scale with their spread, where it is not None: from 1 to either side if `low` is less, otherwise from `low` on."""
    from_one = low < 1
    low = min(low, *(v["mean"] for v in values.values())) * 0.98
    high = max(1.0 if from_one else low, *(v["mean"] + (v["spread"] or 0.0) for v in values.values()))

    def across(value: float) -> float:
        return left + WIDE * max(0.0, math.log(value / low) / math.log(high / low))

    parts = [f'<text class="title" x="{left}" y="24">{escape(title)}</text>']
    start = across(1.0) if from_one else left
    for i, (name, v) in enumerate(values.items()):
        y, end = 40 + i * ROW, across(v["mean"])
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{min(start, end):.1f}" y="{y + 2}" width="{abs(end - start):.1f}" height="{ROW - 5}"/>'
        )
        ends = [across(max(low, v["mean"] + side * (v["spread"] or 0.0))) for side in (-1, 1)]
        parts.append(
            f'<line class="noise" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y + ROW / 2}" y2="{y + ROW / 2}"/>'
        )
        parts.append(f'<text x="{max(start, ends[1]) + 6:.1f}" y="{y + 13}">{form.format(v["mean"])}</text>')
    if from_one:
        parts.append(f'<line class="one" x1="{start:.1f}" x2="{start:.1f}" y1="34" y2="{44 + ROW * len(values)}"/>')
    return "".join(parts)


def curves(title: str, lines: dict[str, list[tuple[float, float]]], unit: str) -> str:
    """An SVG of its own with a line through the points of each entry; across, in `unit`, on a logarithmic scale."""
    width, height, left, bottom = 640, 360, 56, 40
    xs, ys = ([p[i] for points in lines.values() for p in points] for i in (0, 1))
    margin = 0.05 * (max(ys) - min(ys)) or 0.05
    x0, x1, y0, y1 = min(xs) * 0.9, max(xs) * 1.25, min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return left + math.log(x / x0) / math.log(x1 / x0) * (width - left - 110), 40 + (y1 - y) / (y1 - y0) * (
            height - 40 - bottom
        )

    parts = [f'<text class="title" x="{left}" y="24">{escape(title)}</text>']
    for y in ticks(y0, y1):
        _, at = place(x0, y)
        parts.append(
            f'<line class="one" x1="{left}" x2="{width - 100}" y1="{at:.1f}" y2="{at:.1f}"/><text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in (n * 10**power for power in range(-1, 5) for n in (1, 2, 5)):
        if x0 <= x <= x1:
            at, _ = place(x, y0)
            parts.append(f'<text x="{at:.1f}" y="{height - 16}" text-anchor="middle">{x:g} {unit}</text>')
    for i, (name, points) in enumerate(lines.items()):
        at = [place(*p) for p in sorted(points)]
        parts.append(f'<polyline class="line c{i}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}"/>')
        parts += [f'<circle class="dot c{i}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in at]
        parts.append(f'<text x="{at[-1][0] + 10:.1f}" y="{at[-1][1] + 4:.1f}">{escape(name)}</text>')
    return standalone(width, height, parts)
