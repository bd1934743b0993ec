"""Charts as inline SVG: lines over steps, and dots with intervals; colours and type come from the
page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
MOST_POINTS = 600

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One curve. `color` counts in the page's palette; `dots` marks each point, `dashed` and
    `faint` set it back."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int
    dots: bool = False
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """One system of a dot chart with its interval, if known; `ours` puts it in the first colour."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    ours: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers, the first not above `low` and the last not below `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Exponential moving average with bias correction, so that the first value stands for
    itself."""
    keep = max(0.0, 1 - 2 / (window + 1))
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def short(value: float) -> str:
    """A number for an axis: 1500 -> 1.5k, .05 -> 0.05."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.6g}"


def line_chart(title: str, x_label: str, lines: Sequence[Line], from_zero: bool = False) -> str:
    """A figure with a legend, axes and one path a line; a `<title>` names the value under the
    pointer.

    `from_zero` begins the value axis at zero, as rates and scores want it; losses are read by their
    differences."""
    lines = [line for line in lines if len(line.xs)]
    ys = [y for line in lines for y in line.ys]
    x_ticks = ticks(0, max(x for line in lines for x in line.xs))
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    x_scale = _scale(0, max(x for line in lines for x in line.xs), LEFT, WIDTH - RIGHT)
    y_scale = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x = x_scale(tick)
        if x <= WIDTH - RIGHT + 1:
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" '
                f'y2="{HEIGHT - BOTTOM + 4}"/>'
            )
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">'
                f"{short(tick)}</text>"
            )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts += [_path(line, x_scale, y_scale, x_label) for line in lines]
    legend = "".join(
        f'<span><i class="key c{line.color}{" dashed" if line.dashed else ""}"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
        if not line.faint
    )
    return _figure(title, HEIGHT, "".join(parts), legend)


def dot_chart(title: str, dots: Sequence[Dot]) -> str:
    """One row a system, best first: a dot at its value, a bar through its interval, the value at
    the right."""
    dots = sorted(dots, key=lambda dot: -dot.value)
    left, right, row = 168, 62, 34
    height = TOP + row * len(dots) + 30
    scale_ticks = ticks(
        0.0, max(max(dot.value, *(dot.interval or (0.0,))) for dot in dots), wanted=3
    )
    scale = _scale(0.0, scale_ticks[-1], left, WIDTH - right)
    floor = height - 30
    parts = []
    for tick in scale_ticks:
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{short(tick)}</text>'
        )
    for index, dot in enumerate(dots):
        y = TOP + row * (index + 0.5)
        color, weight = ("c0", ' class="strong"') if dot.ours else ("muted", "")
        told = f" ({score(dot.interval[0])} to {score(dot.interval[1])})" if dot.interval else ""
        parts.append(f"<g><title>{escape(dot.name)}: {score(dot.value)}{told}</title>")
        parts.append(
            f'<line class="stem" x1="{left}" x2="{scale(dot.value):.1f}" y1="{y}" y2="{y}"/>'
        )
        if dot.interval:
            low, high = (f"{scale(bound):.1f}" for bound in dot.interval)
            whisker = f"M{low},{y - 7}V{y + 7}M{high},{y - 7}V{y + 7}M{low},{y}H{high}"
            parts.append(f'<path class="range {color}" d="{whisker}"/>')
        parts.append(f'<circle class="{color}" cx="{scale(dot.value):.1f}" cy="{y}" r="4.5"/>')
        parts.append(
            f'<text{weight} x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(dot.name)}</text>'
        )
        parts.append(
            f'<text{weight} x="{WIDTH - 4}" y="{y + 4}" text-anchor="end">'
            f"{score(dot.value)}</text></g>"
        )
    return _figure(title, height, "".join(parts), "")


def score(value: float | None) -> str:
    """A metric between 0 and 1 as tables of the field write it: .0493."""
    if value is None:
        return "–"
    return f"{value:.4f}".replace("0.", ".", 1) if 0 <= value < 0.99995 else f"{value:.4f}"


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _path(line: Line, x_scale: Scale, y_scale: Scale, x_label: str) -> str:
    stride = -(-len(line.xs) // MOST_POINTS)
    # The last point is the one people look for, so the stride counts from the end.
    points = list(zip(line.xs, line.ys, strict=True))[::-1][::stride][::-1]
    where = [(x_scale(x), y_scale(y)) for x, y in points]
    style = f"c{line.color}" + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    drawn = f'<path class="{style}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in where)}"/>'
    if line.faint:
        return drawn
    every = 1 if line.dots else -(-len(points) // 80)
    shape = "dot" if line.dots or len(points) == 1 else "hover"
    for (x, y), (at_x, at_y) in list(zip(points, where, strict=True))[::-1][::every]:
        label = escape(f"{line.name}: {y:.4g} at {x_label} {x:,.0f}")
        circle = f'class="{shape} c{line.color}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"'
        drawn += f"<circle {circle}><title>{label}</title></circle>"
    return drawn


def _figure(title: str, height: float, body: str, legend: str) -> str:
    keys = f'<span class="keys">{legend}</span>' if legend else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{body}</svg></figure>"
    )
