"""The charts of a sweep on two axes: a knob against the score, scores by choice, learning curves,
epochs by what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from genrec_dist.report.html import text
from genrec_dist.report.svg import score
from genrec_tuning.report.axis import Axis

GROUPS = 6
"""Colours and shapes that are told apart; a seventh group takes the first ones again."""
RIGHT, TOP, BOTTOM = 18, 18, 50


@dataclass(frozen=True)
class Point:
    """One trial of a scatter; without `y` it is marked at the foot."""

    id: str
    told: str
    """What the pointer is told."""
    x: float
    y: float | None
    group: int
    look: str = ""
    """Classes: stopped, failed, best."""


@dataclass(frozen=True)
class Curve:
    """One trial over its epochs."""

    id: str
    told: str
    xs: Sequence[float]
    ys: Sequence[float]
    group: int
    look: str = ""


@dataclass(frozen=True)
class Frame:
    """The box between two axes: where values lie in it, its grid and its labels."""

    x: Axis
    y: Axis
    x_label: str
    y_label: str
    width: float = 480
    height: float = 300

    @property
    def floor(self) -> float:
        return self.height - BOTTOM

    @property
    def left(self) -> float:
        """Room for the longest label of y, and for its title, also in the larger type of a narrow
        page."""
        return 28 + 9.6 * max((len(label) for _, label in self.y.ticks(5)), default=0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + self.x.at(x) * (self.width - self.left - RIGHT),
            self.floor - self.y.at(y) * (self.floor - TOP),
        )

    def drawn(self, only_whole: bool = False) -> str:
        """Grid, ticks and labels; `only_whole` leaves out ticks of x between whole numbers."""
        left, right, parts = self.left, self.width - RIGHT, []
        for share, label in self.y.ticks(5):
            y = self.floor - share * (self.floor - TOP)
            parts.append(
                f'<line class="grid" x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{text(label)}</text>'
            )
        for share, label in self.x.ticks(6):
            if only_whole and (not label.isdigit() or label == "0"):
                continue
            x = left + share * (right - left)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.floor}" y2="{self.floor + 5}"/>'
            )
            parts.append(
                f'<text x="{x:.1f}" y="{self.floor + 20}" text-anchor="middle">{text(label)}</text>'
            )
        parts.append(
            f'<line class="axis" x1="{left:.1f}" x2="{right}" y1="{self.floor}" y2="{self.floor}"/>'
        )
        middle, half = (left + right) / 2, (TOP + self.floor) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{self.height - 8}" text-anchor="middle">{text(self.x_label)}</text>'
        )
        turned = f'transform="translate(13 {half:.1f}) rotate(-90)" text-anchor="middle"'
        return "".join(parts) + f"<text {turned}>{text(self.y_label)}</text>"


def figure(title: str, width: float, height: float, body: str, keys: str = "") -> str:
    """A chart with its title and its keys, which are HTML."""
    told = f'<span class="keys">{keys}</span>' if keys else ""
    return (
        f"<figure><figcaption><b>{text(title)}</b>{told}</figcaption>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text(title)}">{body}</svg></figure>'
    )


def mark(group: int, x: float, y: float, size: float = 5.5, look: str = "") -> str:
    """The group's shape in its colour: circle, square, triangle, diamond, plus, triangle on its
    tip; a cross if `failed`."""
    classes = f"mark c{group % GROUPS} {look}".strip()
    return f'<path class="{text(classes)}" d="{_shape(-1 if "failed" in look else group % GROUPS, x, y, size)}"/>'


def keys_of(groups: Sequence[str], looks: Sequence[tuple[str, str]] = ()) -> str:
    """Keys of a chart: each group's shape, and what a look means."""
    shown = [(index, "", name) for index, name in enumerate(groups)] + [
        (0, look, name) for look, name in looks
    ]
    return "".join(
        f"<span>{key_mark(index, look)}{text(name)}</span>" for index, look, name in shown
    )


def key_mark(group: int, look: str = "") -> str:
    plain = " plain" if look else ""
    return f'<svg class="sign{plain}" viewBox="0 0 16 16" aria-hidden="true">{mark(group, 8, 8, look=look)}</svg>'


def scatter(title: str, frame: Frame, points: Sequence[Point], keys: str) -> str:
    """Every trial where its knob and its score put it."""
    parts = [frame.drawn()]
    for point in sorted(points, key=lambda point: (point.y is not None, point.y or 0.0)):
        lost = point.y is None
        x, y = frame.place(point.x, frame.y.low if point.y is None else point.y)
        sign = mark(point.group, x, y - (7 if lost else 0), look=point.look)
        label = _beside(point.id, x, y, frame) if "best" in point.look else ""
        parts.append(_of_trial(point.id, point.told, sign + label))
    return figure(title, frame.width, frame.height, "".join(parts), keys)


def strips(
    title: str, axis: Axis, groups: Sequence[str], points: Sequence[Point], x_label: str
) -> str:
    """One row a group: its trials by score, their median as a bar, how many they are."""
    # Half of the last tick's label reaches beyond the axis.
    left, right, row, top = (
        128.0,
        474 - 3.7 * max(len(label) for _, label in axis.ticks(4)),
        52.0,
        10.0,
    )
    height = top + row * len(groups) + BOTTOM
    floor, parts = height - BOTTOM, []
    for share, label in axis.ticks(4):
        x = left + share * (right - left)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{text(label)}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">{text(x_label)}</text>'
    )
    for index, name in enumerate(groups):
        middle = top + row * (index + 0.5)
        here = [point for point in points if point.group == index]
        scored = sorted(
            (point for point in here if point.y is not None), key=lambda point: point.y or 0.0
        )
        parts.append(
            f'<text class="strong" x="{left - 14}" y="{middle - 1:.1f}" text-anchor="end">{_short(name)}</text>'
        )
        count = f"{len(here)} trial{'s' * (len(here) != 1)}"
        parts.append(
            f'<text class="few" x="{left - 14}" y="{middle + 14:.1f}" text-anchor="end">{count}</text>'
        )
        places = [left + axis.at(point.y) * (right - left) for point in scored]
        if places:
            at = median(places)
            told = f"median of {text(name)}: {score(median(point.y or 0.0 for point in scored))}"
            bar = f'x1="{at:.1f}" x2="{at:.1f}" y1="{middle - 18}" y2="{middle + 18}"'
            parts.append(
                f'<g><title>{told}</title><line class="median c{index % GROUPS}" {bar}/></g>'
            )
        for point, x, shift in zip(scored, places, _apart(places), strict=True):
            parts.append(
                _of_trial(point.id, point.told, mark(index, x, middle + shift, look=point.look))
            )
    return figure(title, 480, height, "".join(parts), '<span><i class="bar"></i>median</span>')


def curves(
    title: str, frame: Frame, lines: Sequence[Curve], rungs: Sequence[int], keys: str
) -> str:
    """The score over the epochs; a trial that was stopped is dashed and ends in a mark, `rungs` are
    where trials are compared."""
    parts = [frame.drawn(only_whole=True)]
    for rung in rungs:
        x, _ = frame.place(rung, frame.y.low)
        told = f"<title>ASHA compares here: epoch {rung}</title>"
        parts.append(
            f'<g>{told}<line class="rung" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{frame.floor}"/></g>'
        )
    for line in sorted(lines, key=lambda line: ("best" in line.look, "stopped" not in line.look)):
        points = [frame.place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        x, y = points[-1]
        label = _beside(line.id, x, y, frame) if "best" in line.look else ""
        body = (
            f'<path class="hit" d="{path}"/><path class="line c{line.group % GROUPS}" d="{path}"/>'
        )
        body += mark(line.group, x, y, 3.6 if "stopped" in line.look else 4.5, line.look) + label
        parts.append(_of_trial(line.id, line.told, body, f"curve {line.look}"))
    return figure(title, frame.width, frame.height, "".join(parts), keys)


def stacked(
    title: str, x_label: str, y_label: str, layers: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """A bar an epoch, counted from 1: how many trials ran it, and what became of the others, one
    layer each."""
    length = max(len(counts) for _, counts in layers)
    most = max(sum(counts[index] for _, counts in layers) for index in range(length))
    whole = max(1, -(-most // 4))
    frame = Frame(
        Axis("epoch", "linear", 0.5, length + 0.5),
        Axis("trials", "linear", 0, whole * -(-most // whole)),
        x_label,
        y_label,
    )
    parts = [frame.drawn(only_whole=True)]
    gap = 0.12 if length <= 60 else 0.0
    for index in range(length):
        foot = 0
        for layer, (name, counts) in enumerate(layers):
            if not counts[index]:
                continue
            x0, y0 = frame.place(index + 0.5 + gap / 2, foot)
            x1, y1 = frame.place(index + 1.5 - gap / 2, foot + counts[index])
            told = f"<title>epoch {index + 1}: {counts[index]} {text(name)}</title>"
            box = f'x="{x0:.1f}" y="{y1:.1f}" width="{x1 - x0:.1f}" height="{y0 - y1:.1f}"'
            parts.append(f'<rect class="layer{layer}" {box}>{told}</rect>')
            foot += counts[index]
    told = "".join(
        f'<span><i class="box layer{layer}"></i>{text(name)}</span>'
        for layer, (name, counts) in enumerate(layers)
        if any(counts)
    )
    return figure(title, frame.width, frame.height, "".join(parts), told)


def _of_trial(id_: str, told: str, body: str, look: str = "") -> str:
    classes = f' class="{text(look.strip())}"' if look else ""
    return f'<g{classes} data-trial="{text(id_)}"><title>{text(told)}</title>{body}</g>'


def _beside(label: str, x: float, y: float, frame: Frame) -> str:
    """A name beside its point, on the side where there is room."""
    right = x < frame.width - RIGHT - 70
    where = f'x="{x + (10 if right else -10):.1f}" y="{y - 8:.1f}" text-anchor="{"start" if right else "end"}"'
    return f'<text class="strong" {where}>{text(label)}</text>'


def _apart(places: Sequence[float], near: float = 11.0) -> list[float]:
    """How far each of the sorted places moves aside, so that marks of like score do not cover each
    other."""
    lanes: list[float] = []
    shifts = []
    for place in places:
        lane = next((index for index, last in enumerate(lanes) if place - last >= near), len(lanes))
        if lane == len(lanes):
            lanes.append(place)
        lanes[lane] = place
        # 0, 1, -1, 2, -2 steps from the middle; beyond the row's room they overlap again.
        shifts.append(max(-18.0, min(18.0, (lane + 1) // 2 * (1 if lane % 2 else -1) * 8.5)))
    return shifts


def _short(name: str, most: int = 12) -> str:
    return (
        text(name) if len(name) <= most else f"{text(name[: most - 1])}…<title>{text(name)}</title>"
    )


def _shape(kind: int, x: float, y: float, size: float) -> str:
    s = size
    if kind == 0:
        return f"M{x - s:.1f},{y:.1f}a{s},{s} 0 1,0 {2 * s},0a{s},{s} 0 1,0 {-2 * s},0Z"
    if kind == 1:
        e = 0.88 * s
        return f"M{x - e:.1f},{y - e:.1f}h{2 * e:.1f}v{2 * e:.1f}h{-2 * e:.1f}Z"
    if kind in (2, 5):
        up = 1 if kind == 2 else -1
        tip, foot, half = y - 1.2 * s * up, y + 0.8 * s * up, 1.12 * s
        return f"M{x:.1f},{tip:.1f}L{x + half:.1f},{foot:.1f}L{x - half:.1f},{foot:.1f}Z"
    if kind == 3:
        e = 1.25 * s
        return f"M{x:.1f},{y - e:.1f}L{x + e:.1f},{y:.1f}L{x:.1f},{y + e:.1f}L{x - e:.1f},{y:.1f}Z"
    if kind == 4:
        a, b = 0.42 * s, 1.15 * s
        return (
            f"M{x - a:.1f},{y - b:.1f}h{2 * a:.1f}v{b - a:.1f}h{b - a:.1f}v{2 * a:.1f}h{a - b:.1f}v{b - a:.1f}"
            f"h{-2 * a:.1f}v{a - b:.1f}h{a - b:.1f}v{-2 * a:.1f}h{b - a:.1f}Z"
        )
    return f"M{x - s:.1f},{y - s:.1f}L{x + s:.1f},{y + s:.1f}M{x + s:.1f},{y - s:.1f}L{x - s:.1f},{y + s:.1f}"
