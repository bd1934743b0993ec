"""Charts as inline SVG: lines over steps, and dots with intervals; colours and type come from the
page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
MOST_POINTS = 600
ROOM_FOR_NAME = 21
"""Letters of a name beside a dot chart."""

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One curve. `color` counts in the page's palette; `dots` marks each point, `dashed` and
    `faint` set it back; a faint one is in no legend."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int
    dots: bool = False
    dashed: bool = False
    faint: bool = False
    in_legend: bool = True


@dataclass(frozen=True)
class Dot:
    """One system of a dot chart with its interval, if known; `ours` puts its name in bold."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    ours: bool = False
    color: int | None = None
    """In the page's palette; None: the first colour of `ours`, grey of the others."""

    @property
    def style(self) -> str:
        if self.color is not None:
            return f"c{self.color}"
        return "c0" if self.ours else "muted"


@dataclass(frozen=True)
class BucketSeries:
    """One system of a bucket chart: a value and an interval by bucket, None where there is none."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None]
    color: int


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


def short_count(count: float) -> str:
    """A count of two or three figures: 943, 4.2k, 22k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return (
                f"{count / size:.3g}{unit}" if count >= 100 * size else f"{count / size:.2g}{unit}"
            )
    return f"{count:.0f}"


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
    parts = _value_axis(y_ticks, y_scale)
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
    parts.append(_base_line(x_label, HEIGHT - 5))
    parts += [_path(line, x_scale, y_scale, x_label) for line in lines]
    legend = "".join(
        _key(line.name, line.color, line.dashed)
        for line in lines
        if line.in_legend and not line.faint
    )
    return _figure(title, HEIGHT, "".join(parts), legend)


def dot_chart(title: str, dots: Sequence[Dot], signed: bool = False) -> str:
    """One row a system, best first: a dot at its value, a bar through its interval, the value at
    the right.

    The axis holds zero; `signed` writes values as differences, with their sign."""
    dots = sorted(dots, key=lambda dot: -dot.value)
    left, right, row = 168, 62, 34
    height = TOP + row * len(dots) + 30
    bounds = [bound for dot in dots for bound in (dot.value, *(dot.interval or ()))]
    scale_ticks = ticks(min(0.0, *bounds), max(0.0, *bounds), wanted=3)
    scale = _scale(scale_ticks[0], scale_ticks[-1], left, WIDTH - right)
    write = signed_score if signed else score
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
        color, weight = dot.style, ' class="strong"' if dot.ours else ""
        told = f" ({write(dot.interval[0])} to {write(dot.interval[1])})" if dot.interval else ""
        # The end of a path says more than its beginning.
        name = dot.name if len(dot.name) <= ROOM_FOR_NAME else f"…{dot.name[1 - ROOM_FOR_NAME :]}"
        parts.append(f"<g><title>{escape(dot.name)}: {write(dot.value)}{told}</title>")
        parts.append(
            f'<line class="stem" x1="{scale(0.0):.1f}" x2="{scale(dot.value):.1f}" '
            f'y1="{y}" y2="{y}"/>'
        )
        if dot.interval:
            low, high = (f"{scale(bound):.1f}" for bound in dot.interval)
            whisker = f"M{low},{y - 7}V{y + 7}M{high},{y - 7}V{y + 7}M{low},{y}H{high}"
            parts.append(f'<path class="range {color}" d="{whisker}"/>')
        parts.append(f'<circle class="{color}" cx="{scale(dot.value):.1f}" cy="{y}" r="4.5"/>')
        parts.append(
            f'<text{weight} x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
        )
        parts.append(
            f'<text{weight} x="{WIDTH - 4}" y="{y + 4}" text-anchor="end">'
            f"{write(dot.value)}</text></g>"
        )
    return _figure(title, height, "".join(parts), "")


def bucket_chart(
    title: str, x_label: str, buckets: Sequence[tuple[str, str]], series: Sequence[BucketSeries]
) -> str:
    """A column of dots with intervals per bucket, those of the systems beside each other; the value
    axis begins at zero.

    Args:
        title: of the figure.
        x_label: what the buckets are of.
        buckets: name of each and the line below it, such as its number of users.
        series: a value by bucket each.
    """
    height, floor = HEIGHT + 18, HEIGHT - BOTTOM
    highest = max(
        (
            bound
            for one in series
            for value, interval in zip(one.values, one.intervals, strict=True)
            if value is not None
            for bound in (value, *(interval or ()))
        ),
        default=0.0,
    )
    y_ticks = ticks(0.0, highest)
    scale = _scale(0.0, y_ticks[-1], floor, TOP)
    parts = [*_value_axis(y_ticks, scale), _base_line(x_label, height - 6)]
    width = (WIDTH - RIGHT - LEFT) / max(len(buckets), 1)
    for at, (name, below) in enumerate(buckets):
        middle = LEFT + width * (at + 0.5)
        for line, words in enumerate((name, below)):
            y = floor + 19 + 17 * line
            parts.append(
                f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(words)}</text>'
            )
        for place, one in enumerate(series):
            value, interval = one.values[at], one.intervals[at]
            if value is None:
                continue
            x, color = middle + 14 * (place - (len(series) - 1) / 2), f"c{one.color}"
            told = f" ({score(interval[0])} to {score(interval[1])})" if interval else ""
            label = escape(f"{one.name}, {name}: {score(value)}{told}")
            parts.append(f"<g><title>{label}</title>")
            if interval:
                low, high = (f"{scale(bound):.1f}" for bound in interval)
                start, end = f"{x - 4:.1f}", f"{x + 4:.1f}"
                whisker = f"M{start},{low}H{end}M{start},{high}H{end}M{x:.1f},{low}V{high}"
                parts.append(f'<path class="range {color}" d="{whisker}"/>')
            parts.append(
                f'<circle class="{color}" cx="{x:.1f}" cy="{scale(value):.1f}" r="4.5"/></g>'
            )
    legend = "".join(_key(one.name, one.color) for one in series)
    return _figure(title, height, "".join(parts), legend)


def score(value: float | None) -> str:
    """A metric between 0 and 1 as tables of the field write it: .0493."""
    if value is None:
        return "–"
    return f"{value:.4f}".replace("0.", ".", 1) if 0 <= value < 0.99995 else f"{value:.4f}"


def signed_score(value: float) -> str:
    """A difference of two metrics: +.0012, −.0004."""
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _value_axis(y_ticks: Sequence[float], y_scale: Scale) -> list[str]:
    """A grid line and a number per tick."""
    parts = []
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    return parts


def _base_line(x_label: str, y: float) -> str:
    """The line below a chart, and its name at height `y`."""
    floor = HEIGHT - BOTTOM
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{y}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )


def _key(name: str, color: int, dashed: bool = False) -> str:
    """One entry of a legend."""
    return f'<span><i class="key c{color}{" dashed" if dashed else ""}"></i>{escape(name)}</span>'


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
