"""Points in time as logs write them (seconds, milliseconds or microseconds since 1970, ISO 8601)
as microseconds since 1970."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import polars as pl

TimeUnit = Literal["auto", "s", "ms", "us"]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY_MICROS = 86_400_000_000
END = 4_102_444_800 * 1_000_000
"""2100-01-01: a later time is a slip of the pen or of the unit."""
_MICROS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# Both are times before the year 5138; numbers of microseconds are recognised from 1973 on.
_LARGEST_SECONDS, _LARGEST_MILLISECONDS = 1e11, 1e14
# Python has no date of such a year; Parquet has.
_FAR_DATE = re.compile(r"(-[0-9]{4,}|[0-9]{5,})-[0-9]{2}-[0-9]{2}(T.*)?")
_DATE_FORMS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
)


@dataclass
class Clock:
    """Reads the times of one log; `auto`: the first number settles the unit of all."""

    unit: TimeUnit = "auto"

    def __post_init__(self) -> None:
        if self.unit not in get_args(TimeUnit):
            hint = "choose auto, s, ms or us; dates in ISO 8601 need none"
            raise ValueError(f"time unit is {self.unit!r}: {hint}")

    def micros(self, value: Any) -> int | str:
        """Microseconds since 1970 of one value (text or number), or else what is wrong with it."""
        if value is None or value == "":
            return "no time"
        text = str(value).strip()
        if text.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
            return f"time is {text}"
        found: int | None
        if _NUMBER.fullmatch(text):
            found = self._of_number(text)
        elif _FAR_DATE.fullmatch(text):
            found = -1 if text.startswith("-") else END
        else:
            found = _of_date(text)
        if found is None:
            forms = "neither a number nor a date as 2014-07-23, or a time as 2014-07-23 12:30"
            return f"time {text[:40]!r} is {forms}"
        if found < 0:
            return f"time {text[:40]} is negative, before 1970"
        if found >= END:
            unit = f" (taken as {self.unit}, which --time-unit settles)" * (self.unit != "auto")
            return f"time {text[:40]} lies in the far future, after 2099{unit}"
        return found

    def column(self, values: pl.Series) -> pl.Series:
        """Int64 microseconds of a column; null where only `micros` can say what is wrong."""
        import polars as pl

        values = _parsed(values) if values.dtype == pl.String else values
        if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
            found = values.cast(pl.Datetime("us")).cast(pl.Int64)
        elif values.dtype.is_integer():
            values = values.cast(pl.Int64, strict=False)
            known = _within(values.head(1000))
            if known.is_empty():
                return values.clear(len(values))
            factor = self._factor(known[0])
            found = values.set((values < 0) | (values > END // factor), None) * factor
        elif values.dtype.is_float():
            values = values.cast(pl.Float64)
            known = _within(values.head(1000))
            if known.is_empty():
                return pl.Series(values.name, [None] * len(values), dtype=pl.Int64)
            micros = (values * self._factor(known[0]) + 0.5).floor()
            wrong = ~micros.is_finite() | (micros < 0) | (micros >= END)
            found = micros.set(wrong, None).cast(pl.Int64)
        else:
            return pl.Series(values.name, [None] * len(values), dtype=pl.Int64)
        return found.set((found < 0) | (found >= END), None)

    def _of_number(self, text: str) -> int:
        number = float(text)
        if not 0 <= number < END:
            return -1 if number < 0 else END
        factor = self._factor(number)
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            return int(text) * factor
        return min(math.floor(number * factor + 0.5), END)

    def _factor(self, first: float) -> int:
        """Microseconds of one unit. `first`: settles it, where nothing has yet; no time in any unit
        does."""
        if self.unit == "auto":
            if abs(first) < _LARGEST_SECONDS:
                self.unit = "s"
            else:
                self.unit = "ms" if abs(first) < _LARGEST_MILLISECONDS else "us"
        return _MICROS[self.unit]


def _within(values: pl.Series) -> pl.Series:
    """Those numbers that are a time in some unit."""
    return values.filter((values >= 0) & (values < END))


def _parsed(values: pl.Series) -> pl.Series:
    """Texts as integers, floats or dates where all of them are; else texts or nulls."""
    import polars as pl

    whole = values.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return whole
    if whole.null_count() < len(whole):
        return values.clear(len(values)).cast(pl.Null)  # mixed
    numbers = values.cast(pl.Float64, strict=False)
    if numbers.null_count() < len(numbers):
        return numbers
    for form in _DATE_FORMS:
        dates = values.str.to_datetime(form, strict=False, time_unit="us")
        if not dates.null_count():
            return dates
    return values


def moment(text: str, option: str, end_of_day: bool = False) -> int:
    """Microseconds since 1970 of a date or time in ISO 8601.

    Args:
        text: the date or time.
        option: what the user gave it by.
        end_of_day: a date alone means its last microsecond.

    Raises:
        ValueError: it is neither; the message names the option.
    """
    found = _of_date(text.strip())
    if found is None:
        forms = "give a date as 2019-12-31, or a time as 2019-12-31T00:00:00"
        raise ValueError(f"{option} {text[:40]}: {forms}")
    return found + (DAY_MICROS - 1 if end_of_day and len(text.strip()) <= 10 else 0)


def _of_date(text: str) -> int | None:
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        passed = found - EPOCH
    except (ValueError, OverflowError):
        return None
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
