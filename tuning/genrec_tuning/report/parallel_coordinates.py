"""Parallel coordinates: one axis a knob, the score last, one line a trial in the colour of its
score."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from genrec_dist.report.html import text
from genrec_tuning.record import Value
from genrec_tuning.report.axis import Axis

TONES = 9
"""Shades of the score's scale, `q0` (worst) to `q8`; the page's style knows their colours."""
BAND = 0.13
"""Largest share of an axis over which the lines through one choice are spread, so that they stay
apart."""

Way = Literal["across", "down"]


@dataclass(frozen=True)
class Thread:
    """One trial: where it goes through which axis, and how it looks."""

    id: str
    told: str
    """What the pointer is told."""
    values: Mapping[str, Value]
    """Axis name -> value; an axis that is missing does not apply."""
    rank: float
    """0: worst score, 1: best."""
    look: str = ""
    """Classes: stopped, failed, best."""


def parallel_coordinates(
    axes: Sequence[Axis], threads: Sequence[Thread], absent: Mapping[str, str]
) -> str:
    """Two drawings of the same, of which the page shows one: axes side by side, or one below the
    other where it is narrow.

    `absent` names an axis's place for those that have no value on it.
    """
    # The best is drawn last, so that nothing covers it.
    threads = sorted(threads, key=lambda thread: (thread.look != "failed", thread.rank))
    return "".join(_Drawing(axes, threads, absent, way).drawn() for way in ("across", "down"))


def tone(rank: float) -> str:
    return f"q{min(TONES - 1, int(rank * TONES))}"


class _Drawing:
    """One of the two: everything is placed by (axis, share of the way), which alone knows which way
    the axes run."""

    def __init__(
        self, axes: Sequence[Axis], threads: Sequence[Thread], absent: Mapping[str, str], way: Way
    ):
        self.axes, self.threads, self.absent, self.way = axes, threads, absent, way
        self.gap = max(100.0, 854 / max(1, len(axes) - 1)) if way == "across" else 84.0
        steps = self.gap * (len(axes) - 1)
        self.width, self.height = (steps + 130, 388.0) if way == "across" else (360.0, steps + 92)
        self.gone = {
            axis.name for axis in axes if any(axis.name not in thread.values for thread in threads)
        }
        self.spread = {axis.name: self._spread(axis) for axis in axes}

    def drawn(self) -> str:
        body = "".join(self._thread(thread) for thread in self.threads)
        body += "".join(self._axis(index) for index in range(len(self.axes)))
        box = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        least = (
            f' style="min-width:{self.width:.0f}px"'
            if self.way == "across" and len(self.axes) > 9
            else ""
        )
        label = "Each trial as a line through its values to its score"
        return f'<div class="wide {self.way}"><svg {box}{least} role="img" aria-label="{label}">{body}</svg></div>'

    def place(self, index: int, share: float) -> tuple[float, float]:
        """A share of -1 is the place beside the axis, of those without a value; what is less or
        more lies about it."""
        if self.way == "across":
            return 65 + index * self.gap, 352 - (
                share + 1
            ) * 40 if share < -0.5 else 312 - share * 250
        return 36 + (share + 1) * 40 if share < -0.5 else 92 + share * 246, 48 + index * self.gap

    def _spread(self, axis: Axis) -> dict[str, float]:
        """Thread -> its place among those of the same choice, or of none, -0.5 to 0.5, by score."""
        here: dict[int, list[str]] = {}
        for thread in self.threads:
            value = thread.values.get(axis.name)
            where = (
                -1
                if axis.name not in thread.values
                else axis.index(value)
                if axis.kind == "choice"
                else -2
            )
            here.setdefault(where, []).append(thread.id)
        return {
            id_: (order + 0.5) / len(ids) - 0.5
            for where, ids in here.items()
            if where > -2
            for order, id_ in enumerate(ids)
        }

    def _share(self, axis: Axis, thread: Thread) -> float:
        if axis.name not in thread.values:
            return -1 + 0.4 * self.spread[axis.name][thread.id]
        share = axis.at(thread.values[axis.name])
        if axis.kind != "choice":
            return share
        return self._within(axis, share) + _band(axis) * self.spread[axis.name][thread.id]

    def _within(self, axis: Axis, share: float) -> float:
        """Where a choice's band has its middle: the outermost ones stay on the axis."""
        return share if axis.kind != "choice" else _band(axis) / 2 + share * (1 - _band(axis))

    def _thread(self, thread: Thread) -> str:
        points = [
            self.place(index, self._share(axis, thread)) for index, axis in enumerate(self.axes)
        ]
        path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
        bend = self.gap * 0.42
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if self.way == "across":
                path += f"C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"
            else:
                path += f"C{x0:.1f},{y0 + bend:.1f} {x1:.1f},{y1 - bend:.1f} {x1:.1f},{y1:.1f}"
        classes = f"thread {tone(thread.rank)} {thread.look}".strip()
        return (
            f'<g class="{text(classes)}" data-trial="{text(thread.id)}"><title>{text(thread.told)}</title>'
            f'<path class="hit" d="{path}"/><path class="line" d="{path}"/></g>'
        )

    def _axis(self, index: int) -> str:
        axis = self.axes[index]
        last = index == len(self.axes) - 1
        (x0, y0), (x1, y1) = self.place(index, 0), self.place(index, 1)
        parts = [f'<line class="axis" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>']
        if last:
            parts.append(self._scale(index))
        room = len(axis.choices) if axis.kind == "choice" else 6 if self.way == "across" else 5
        for share, label in axis.ticks(room):
            parts.append(self._tick(index, self._within(axis, share), label, last))
        if axis.name in self.gone:
            parts.append(self._gone(index, self.absent.get(axis.name, "not applied")))
        return "".join(parts) + self._name(index)

    def _scale(self, index: int) -> str:
        """The score's own axis shows which colour means what."""
        parts = []
        for step in range(TONES):
            (x0, y0), (x1, y1) = (
                self.place(index, step / TONES),
                self.place(index, (step + 1) / TONES),
            )
            if self.way == "across":
                parts.append(
                    f'<rect class="q{step}" x="{x0 - 4:.1f}" y="{y1:.1f}" width="8" height="{y0 - y1 + 0.4:.1f}"/>'
                )
            else:
                parts.append(
                    f'<rect class="q{step}" x="{x0:.1f}" y="{y0 - 4:.1f}" width="{x1 - x0 + 0.4:.1f}" height="8"/>'
                )
        return "".join(parts)

    def _gone(self, index: int, label: str) -> str:
        (x0, y0), (x1, y1) = self.place(index, -1.2), self.place(index, -0.8)
        x, y = (x0, y0 + 18) if self.way == "across" else ((x0 + x1) / 2, y0 + 18)
        line = f'<line class="axis" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>'
        return f'{line}<text class="none" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{_fitted(label, 12)}</text>'

    def _tick(self, index: int, share: float, label: str, last: bool) -> str:
        x, y = self.place(index, share)
        if self.way == "across":
            side = 1 if last else -1
            stroke = f'x1="{x:.1f}" x2="{x + 5 * side:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            where = (
                f'x="{x + 9 * side:.1f}" y="{y + 4:.1f}" text-anchor="{"start" if last else "end"}"'
            )
            most = int((58 if index == 0 or last else self.gap - 24) / 6.6)
        else:
            count = max(1, len(self.axes[index].choices))
            most = int(246 / count / 6.6) if self.axes[index].choices else 9
            lower = False
            if any(len(choice) > most for choice in self.axes[index].choices):
                # In two rows each label has the room of two.
                lower, most = self.axes[index].choices.index(label) % 2 == 1, min(24, 2 * most)
            stroke = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + (20 if lower else 5):.1f}"'
            where = f'x="{x:.1f}" y="{y + (33 if lower else 18):.1f}" text-anchor="middle"'
        return f'<line class="axis" {stroke}/><text {where}>{_fitted(label, max(4, most))}</text>'

    def _name(self, index: int) -> str:
        section, _, key = self.axes[index].name.rpartition(".")
        x, y = self.place(index, 1)
        if self.way == "down":
            label = f"{section}.{key}" if section else key
            return f'<text class="strong" x="14" y="{y - 14:.1f}">{_fitted(label, 46)}</text>'
        most = int(self.gap / 7.2)
        above = (
            f'<text x="{x:.1f}" y="24" text-anchor="middle">{_fitted(section, most)}</text>'
            if section
            else ""
        )
        return f'{above}<text class="strong" x="{x:.1f}" y="42" text-anchor="middle">{_fitted(key, most)}</text>'


def _band(axis: Axis) -> float:
    """Share of an axis that the lines through one choice take."""
    return min(BAND, 0.6 / max(1, len(axis.choices)))


def _fitted(label: str, most: int) -> str:
    """A label of at most so many letters; what was cut off is told to the pointer."""
    if len(label) <= most:
        return text(label)
    return f"{text(label[: most - 1])}…<title>{text(label)}</title>"
