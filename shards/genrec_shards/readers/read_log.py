"""The door to the readers: a log of any format as frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genrec_shards.errors import BadLines
from genrec_shards.readers.json_reviews import JSON_ENDINGS, read_amazon, read_yelp
from genrec_shards.readers.tabular import ENDINGS, log_files, read_interactions
from genrec_shards.timestamps import Clock, TimeUnit

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class LogOptions:
    """How a log is to be read."""

    columns: tuple[str, ...] | None = None
    """Names of the columns of users, items and times of `interactions`; None looks for usual
    ones."""
    time_unit: TimeUnit = "auto"
    """Of times that are numbers; `auto` is settled by the first of them."""


def read_log(path: Path, format: str, bad: BadLines, options: LogOptions) -> Iterator[pl.DataFrame]:
    """Frames (`frames.py`) of a log. Raises DataError and ValueError, one line."""
    clock = clock_of(format, options)
    if format == "interactions":
        return read_interactions(path, bad, clock, options.columns)
    return (read_amazon if format == "amazon" else read_yelp)(path, bad, clock)


def clock_of(format: str, options: LogOptions) -> Clock:
    """What reads a log's times. Raises ValueError where the options do not go with the format."""
    if options.columns is not None and len(options.columns) != 3:
        raise ValueError(
            f"columns {','.join(options.columns)}: give three names, as userId,movieId,timestamp"
        )
    if options.columns is not None and format != "interactions":
        raise ValueError(
            f"columns with the {format} format, whose columns have names of their own: leave them out"
        )
    return Clock(options.time_unit)


def endings_of(format: str | None) -> tuple[str, ...]:
    """Endings of a folder's files that belong to a log of this format; None: of any."""
    if format is None:
        return (*ENDINGS, *JSON_ENDINGS)
    return ENDINGS if format == "interactions" else JSON_ENDINGS


def source_files(path: Path, format: str) -> list[Path]:
    """The files that `read_log` reads, in its order."""
    return log_files(path, endings_of(format))
