"""Small line charts as inline SVG: no script, no fonts to fetch, colours from the page's style sheet."""

from html import escape

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 28


def chart(title: str, lines: dict[str, list[tuple[float, float]]], x_label: str, level: tuple[str, float] | None = None,
          percent: bool = False) -> str:  # fmt: skip
    """An SVG with one line for each entry of `lines` (name -> [(x, y)]) and, if given, a dashed level with its name."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + ([level[1]] if level else [])
    y0, y1 = (
        (0.0, 1.0) if percent else padded(min(ys), sorted(ys)[int(len(ys) * 0.97) if len(ys) > 40 else -1])
    )  # the first steps fall from far above
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)

    def place(x, y):
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>']
    for y in ticks(y0, y1):
        _, at = place(x0, y)
        name = f"{y:.0%}" if percent else f"{y:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{name}</text>')
    for x in ticks(x0, x1, 4):
        at, _ = place(x, y0)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(x_label)}</text>')
    if level:
        _, at = place(x0, level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(level[0])}</text>'
        )
    for i, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in points))
        parts.append(f'<polyline class="line c{i}" points="{path}"/>')
        if len(lines) > 1:
            at = LEFT + 8 + i * 120
            parts.append(f'<text class="legend c{i}" x="{at}" y="{TOP + 8}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def smooth(points: list[tuple[float, float]], over: int = 9) -> list[tuple[float, float]]:
    """A running median: one noisy batch says nothing."""
    ys = [y for _, y in points]
    half = over // 2
    return [(x, sorted(w := ys[max(0, i - half) : i + half + 1])[len(w) // 2]) for i, (x, _) in enumerate(points)]


def padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.08 or 0.5
    return low - room, high + room


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 1.0
    while power > raw:
        power /= 10
    while power * 10 <= raw:
        power *= 10
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = -(-low // step)
    return [round(step * i, 10) for i in range(int(first), int(high // step) + 1)]
