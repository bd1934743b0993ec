"""Points in time as logs write them: seconds or milliseconds since 1970, or ISO 8601; microseconds
since 1970 within."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import polars as pl

TimeUnit = Literal["auto", "s", "ms", "us"]
_MICROS = {"s": 1_000_000, "ms": 1_000, "us": 1}
END = 4_102_444_800 * 1_000_000
"""2100-01-01: what lies behind is a slip of the pen or of the unit."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A number of seconds before the year 5138, of milliseconds before 5138, of microseconds from 1973
# on.
_LARGEST_SECONDS, _LARGEST_MILLISECONDS = 1e11, 1e14


@dataclass
class Clock:
    """Reads the times of one log; the unit of numbers, where it is not given, is settled by the
    first of them."""

    unit: TimeUnit = "auto"

    def __post_init__(self) -> None:
        if self.unit not in get_args(TimeUnit):
            raise ValueError(
                f"time unit is {self.unit!r}: choose auto, s, ms or us; dates in ISO 8601 need none"
            )

    def micros(self, value: Any) -> int | str:
        """Microseconds since 1970 of one value (text or number), or else what is wrong with it."""
        if value is None or value == "":
            return "no time"
        text = str(value).strip()
        if _NUMBER.fullmatch(text):
            found = self._of_number(text)
        elif text.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
            return f"time is {text}"
        else:
            found = _of_date(text)
        if found is None:
            return f"time {text[:40]!r} is neither a number nor a date as 2014-07-23 or 2014-07-23T12:30:00Z"
        if found < 0:
            return f"time {text[:40]} is negative, before 1970"
        if found >= END:
            return f"time {text[:40]} lies in the far future, after 2099 (taken as {self.unit})"
        return found

    def column(self, values: pl.Series) -> pl.Series:
        """Int64 microseconds of a column; null where `micros` must be asked what is wrong."""
        import polars as pl

        kind = values.dtype
        if kind == pl.Date or isinstance(kind, pl.Datetime):
            found = values.cast(pl.Datetime("us")).cast(pl.Int64)
        elif kind.is_integer():
            found = self._of_integers(values.cast(pl.Int64, strict=False))
        elif kind.is_float():
            found = self._of_floats(values.cast(pl.Float64))
        elif kind == pl.String:
            found = self._of_texts(values)
        else:
            return pl.Series(values.name, [None] * len(values), dtype=pl.Int64)
        return found.set((found < 0) | (found >= END), None)

    def _of_texts(self, values: pl.Series) -> pl.Series:
        import polars as pl

        whole = values.cast(pl.Int64, strict=False)
        if not whole.null_count():
            return self._of_integers(whole)
        if whole.null_count() < len(whole):
            return whole.clear(len(whole))  # mixed: one by one
        numbers = values.cast(pl.Float64, strict=False)
        if numbers.null_count() < len(numbers):
            return self._of_floats(numbers)
        for form in (
            "%Y-%m-%d %H:%M:%S%.f",
            "%Y-%m-%dT%H:%M:%S%.f%#z",
            "%Y-%m-%dT%H:%M:%S%.f",
            "%Y-%m-%d",
        ):
            dates = values.str.to_datetime(form, strict=False, time_unit="us")
            if not dates.null_count():
                return dates.cast(pl.Int64)
        return whole

    def _of_integers(self, values: pl.Series) -> pl.Series:
        first = next((value for value in values.head(1000) if value is not None), None)
        if first is None:
            return values.clear(len(values))
        factor = self._factor(first)
        return values.set((values < 0) | (values > END // factor), None) * factor

    def _of_floats(self, values: pl.Series) -> pl.Series:
        import polars as pl

        first = next(
            (value for value in values.head(1000) if value is not None and math.isfinite(value)),
            None,
        )
        if first is None:
            return pl.Series(values.name, [None] * len(values), dtype=pl.Int64)
        micros = (values * self._factor(first) + 0.5).floor()
        return micros.set(~micros.is_finite() | (micros < 0) | (micros >= END), None).cast(pl.Int64)

    def _of_number(self, text: str) -> int | None:
        number = float(text)
        if not math.isfinite(number):
            return END
        factor = self._factor(number)
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            return int(text) * factor
        return min(math.floor(number * factor + 0.5), END)

    def _factor(self, first: float) -> int:
        if self.unit == "auto":
            size = abs(first)
            self.unit = (
                "s" if size < _LARGEST_SECONDS else "ms" if size < _LARGEST_MILLISECONDS else "us"
            )
        return _MICROS[self.unit]


def moment(text: str, option: str, end_of_day: bool = False) -> int:
    """Microseconds since 1970 of a date or time in ISO 8601. `end_of_day`: a date alone means its
    last microsecond.

    Raises ValueError that names the option.
    """
    found = _of_date(text.strip())
    if found is None:
        raise ValueError(
            f"{option} {text[:40]}: give a date as 2019-12-31, or a time as 2019-12-31T00:00:00"
        )
    return found + (86_400_000_000 - 1 if end_of_day and len(text.strip()) <= 10 else 0)


def _of_date(text: str) -> int | None:
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        passed = found - _EPOCH
    except (ValueError, OverflowError):
        return None
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
