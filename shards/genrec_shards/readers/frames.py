"""What every reader yields: frames of user (String), item (String) and time (Int64, microseconds
since 1970), without gaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genrec_shards.errors import BadLines, DataError
from genrec_shards.timestamps import Clock

if TYPE_CHECKING:
    import polars as pl


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


@dataclass
class LogReader:
    """What the files of one log are read with, in their order."""

    format: str
    bad: BadLines
    clock: Clock
    columns: tuple[str, ...] | None = None
    """Names or places of the columns of users, items and times; None looks for usual names."""

    def frame(self, users: pl.Series, items: pl.Series, times: pl.Series) -> pl.DataFrame | None:
        """A frame of three columns, or None where a row of them is to be looked at."""
        pl = polars()
        users, items = users.cast(pl.String), items.cast(pl.String)
        # Ids come first: the time of a row without them settles no unit.
        if times.null_count() or any(
            ids.null_count() or (ids.str.len_bytes() == 0).any() for ids in (users, items)
        ):
            return None
        micros = self.clock.column(times)
        if micros.null_count():
            return None
        return pl.DataFrame({"user": users, "item": items, "time": micros})

    def frame_one_by_one(
        self, path: str, rows: Iterable[tuple[int, tuple[Any, Any, Any] | str]]
    ) -> pl.DataFrame:
        """A frame of the good rows; `bad` gets the others.

        Args:
            path: the file, as messages name it.
            rows: (line, (user, item, time)), or (line, what is wrong with it).
        """
        pl = polars()
        found: list[tuple[str, str, int]] = []
        for line, row in rows:
            good = row if isinstance(row, str) else self._checked(row)
            if isinstance(good, str):
                self.bad.add(path, line, good)
            else:
                found.append(good)
        schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
        return pl.DataFrame(found, schema=schema, orient="row")

    def _checked(self, row: tuple[Any, Any, Any]) -> tuple[str, str, int] | str:
        user, item = identifier(row[0]), identifier(row[1])
        for kind, name, value in (("user", user, row[0]), ("item", item, row[1])):
            if name is None and value in (None, ""):
                return f"no {kind}"
            if name is None:
                return f"{kind} is {str(value)[:40]!r}, no id"
        assert user is not None
        assert item is not None
        time = self.clock.micros(row[2])
        return time if isinstance(time, str) else (user, item, time)


def listed(names: Iterable[object], most: int) -> str:
    """The first names of a record or table for a message of one line."""
    shown = [str(name)[:40] for name in list(names)[:most]]
    return ", ".join(name if name.isprintable() else repr(name) for name in shown)


def identifier(value: Any) -> str | None:
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
