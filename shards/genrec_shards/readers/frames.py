"""What every reader yields, and how rows that were read one by one become such a frame."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec_shards.errors import BadLines, DataError
from genrec_shards.timestamps import Clock

if TYPE_CHECKING:
    import polars as pl

# A frame has the columns user (String), item (String) and time (Int64, microseconds since 1970),
# without gaps.


def polars() -> Any:
    """The package, imported when a log is read and not before: a machine that trains need not have
    it."""
    try:
        import polars as pl
    except ImportError:
        raise DataError(
            "polars is not installed, and logs are read with it: pip install polars"
        ) from None
    return pl


def frame(users: pl.Series, items: pl.Series, times: pl.Series) -> pl.DataFrame:
    """A frame of three columns of equal length."""
    pl = polars()
    return pl.DataFrame(
        {"user": users.cast(pl.String), "item": items.cast(pl.String), "time": times}
    )


def has_gaps(found: pl.DataFrame) -> bool:
    """Is there a row without user, item or time?"""
    empty = any(int((found[name].str.len_bytes() == 0).sum()) for name in ("user", "item"))
    return empty or any(sum(row) for row in found.null_count().rows())


def frame_one_by_one(
    path: Path | str,
    rows: Iterable[tuple[int, tuple[Any, Any, Any] | str]],
    clock: Clock,
    bad: BadLines,
) -> pl.DataFrame:
    """The good ones of (line, (user, item, time) or what is wrong); the others are `bad`'s."""
    pl = polars()
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    for line, row in rows:
        good = row if isinstance(row, str) else _good(row, clock)
        if isinstance(good, str):
            bad.meet(path, line, good)
            continue
        users.append(good[0])
        items.append(good[1])
        times.append(good[2])
    columns = {"user": users, "item": items, "time": times}
    return pl.DataFrame(columns, schema={"user": pl.String, "item": pl.String, "time": pl.Int64})


def _good(row: tuple[Any, Any, Any], clock: Clock) -> tuple[str, str, int] | str:
    names = []
    for kind, value in zip(("user", "item"), row[:2], strict=True):
        name = _identifier(value)
        if name is None:
            return (
                f"{kind} is {str(value)[:40]!r}, no id" if value not in (None, "") else f"no {kind}"
            )
        names.append(name)
    time = clock.micros(row[2])
    return time if isinstance(time, str) else (names[0], names[1], time)


def _identifier(value: Any) -> str | None:
    """Text or a whole number as an id; a table with gaps holds whole numbers as 7.0."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no text
        return None
    return value
