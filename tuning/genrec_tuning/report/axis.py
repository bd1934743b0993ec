"""One knob or score as a line to draw on: where its values lie, which ticks it has, and how they
are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genrec_dist.report.svg import ticks
from genrec_tuning.record import Sweep, Value

Kind = Literal["linear", "log", "choice"]


@dataclass(frozen=True)
class Axis:
    """`low` to `high` for numbers; `choices`, in order and as they are written, for anything
    else."""

    name: str
    """Dotted key of the recipe, or the score's name."""
    kind: Kind
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    def at(self, value: Value) -> float:
        """How far along the axis a value lies: 0 at the low end, 1 at the high one. Raises
        ValueError for what it does not hold."""
        if self.kind == "choice":
            return 0.5 if len(self.choices) == 1 else self.index(value) / (len(self.choices) - 1)
        if isinstance(value, str | bool | None):
            raise ValueError(f"{self.name}: {value!r} is no number")
        low, high, number = self.low, self.high, float(value)
        if self.kind == "log":
            low, high, number = math.log(low), math.log(high), math.log(number)
        return 0.5 if high == low else (number - low) / (high - low)

    def index(self, value: Value) -> int:
        """Which of the choices a value is. Raises ValueError for none of them."""
        return self.choices.index(written(value))

    def ticks(self, wanted: int = 5) -> list[tuple[float, str]]:
        """(share of the way, label) of each tick that lies on the axis."""
        if self.kind == "choice":
            return [(self.at(choice), choice) for choice in self.choices]
        if math.isclose(self.low, self.high, rel_tol=1e-9):
            return [(0.5, written(self.low))]
        marks = _log_ticks(self.low, self.high, wanted) if self.kind == "log" else []
        inside = marks or self._round_ones(wanted)
        # Ticks that lie close together need more digits to differ.
        digits = next(
            (n for n in range(3, 17) if len({written(mark, n) for mark in inside}) == len(inside)),
            17,
        )
        return [(self.at(mark), written(mark, digits)) for mark in inside]

    def _round_ones(self, wanted: int) -> list[float]:
        """Round numbers on the axis, at least two of them."""
        slack = 1e-6
        inside = [
            mark
            for mark in sorted({*ticks(self.low, self.high, wanted)})
            if -slack <= self.at(mark) <= 1 + slack
        ]
        if len(inside) > 1 or wanted > 100:
            return inside if len(inside) > 1 else [self.low, self.high]
        return self._round_ones(2 * wanted)


def score_axis(name: str, values: Iterable[float], padded: bool = True) -> Axis:
    """A linear axis from tick to tick around the values; `padded` begins it at zero where that
    costs little room."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    marks = ticks(0.0 if padded and low < high / 2 else low, high)
    return Axis(name, "linear", marks[0], marks[-1])


def axes_of(space: Mapping[str, Any], trials: Sequence[Mapping[str, Value]]) -> list[Axis]:
    """An axis a key in the order of the space, keys that only trials have last; wide enough for
    every value.

    `space` maps a dotted key to how it is sampled: `{loguniform: [low, high]}`, `{uniform: ...}`,
    `{int: ...}` or `{choice: ...}`, whose branches may sample keys of their own."""
    found: dict[str, list[tuple[str, Any]]] = {}
    _walk(space, found)
    for values in trials:
        for key in values:
            found.setdefault(key, [])
    return [
        _axis(key, rules, [values[key] for values in trials if key in values])
        for key, rules in found.items()
    ]


def written(value: Value, digits: int = 3) -> str:
    """A value as a person would write it into a recipe: 3e-4, 0.05, 12, true, last-biased. `digits`
    count in fractions."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str | int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"


def _walk(space: Any, found: dict[str, list[tuple[str, Any]]]) -> None:
    if not isinstance(space, Mapping):
        return
    for key, rule in space.items():
        if not isinstance(rule, Mapping) or len(rule) != 1:
            continue
        ((name, told),) = rule.items()
        found.setdefault(str(key), []).append((str(name), told))
        if isinstance(told, Mapping):
            for branch in told.values():
                _walk(branch, found)


def _axis(key: str, rules: list[tuple[str, Any]], values: list[Value]) -> Axis:
    bounds = [told for name, told in rules if name != "choice"]
    numbers = [
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    ends = [
        end
        for told in bounds
        for end in (told if isinstance(told, list | tuple) else ())
        if _is_number(end)
    ]
    numeric = len(numbers) == len(values) and all(math.isfinite(number) for number in numbers)
    if numeric and ends + numbers and not any(name == "choice" for name, _ in rules):
        low, high = min(ends + numbers), max(ends + numbers)
        log = any("log" in name for name, _ in rules) and low > 0
        return Axis(key, "log" if log else "linear", float(low), float(high))
    # By what is written: the record's JSON knows a choice of numbers with branches below them as
    # text.
    options = [option for name, told in rules if name == "choice" for option in told]
    return Axis(
        key, "choice", choices=tuple(dict.fromkeys(map(written, [*options, *values]))) or ("null",)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Powers of ten, and between them 2 and 5, 3, or all digits, as many as are about `wanted`;
    none for less than two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    sets = [(1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), tuple(range(1, 10))]
    inside = [
        [
            digit * 10.0**power
            for power in range(first, last + 1)
            for digit in digits
            if _holds(low, high, digit, power)
        ]
        for digits in sets
    ]
    best = min(inside, key=lambda marks: abs(len(marks) - wanted))
    if len(best) < 2:
        return []
    stride = -(-len(best) // (2 * wanted))
    return best[::stride]


def _holds(low: float, high: float, digit: int, power: int) -> bool:
    mark = digit * 10.0**power
    return low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)


def knobs(sweep: Sweep) -> list[Axis]:
    """What the sweep varies, in the order of its space."""
    space = sweep.space.get("space")
    return axes_of(
        space if isinstance(space, Mapping) else {}, [trial.values for trial in sweep.trials]
    )
