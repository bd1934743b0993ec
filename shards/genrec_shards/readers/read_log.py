"""A log of any format as frames, and which format a log is in where name and first line tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.frames import LogReader
from genrec_shards.readers.json_reviews import read_reviews
from genrec_shards.readers.tabular import is_parquet, read_parquet, read_text
from genrec_shards.readers.text_blocks import blocks, check_readable
from genrec_shards.timestamps import Clock, TimeUnit

if TYPE_CHECKING:
    import polars as pl

Format = Literal["auto", "sequences", "data", "interactions", "amazon", "yelp"]
LOG_FORMATS = ("interactions", "amazon", "yelp")
TABLE_ENDINGS = ("csv", "tsv", "inter", "parquet")
JSON_ENDINGS = ("json", "jsonl", "ndjson")


@dataclass(frozen=True)
class LogOptions:
    """How a log is to be read."""

    columns: tuple[str, ...] | None = None
    """Names of the columns of users, items and times of `interactions`; None looks for usual
    ones."""
    time_unit: TimeUnit = "auto"
    """Of times that are numbers; `auto` is settled by the first of them."""

    def reader(self, format: str, bad: BadLines) -> LogReader:
        """What reads the log. Raises ValueError where the options do not go with the format."""
        if self.columns is not None and len(self.columns) != 3:
            names = ",".join(self.columns)
            raise ValueError(f"columns {names}: give three names, as userId,movieId,timestamp")
        if self.columns is not None and format != "interactions":
            own = f"the {format} format, whose columns have names of their own"
            raise ValueError(f"columns with {own}: leave them out")
        return LogReader(format, bad, Clock(self.time_unit), self.columns)


def read_log(path: Path, format: str, bad: BadLines, options: LogOptions) -> Iterator[pl.DataFrame]:
    """Frames (`frames.py`) of a file, or of a folder's files by name, in the order of their rows.

    Raises:
        DataError: one line with file and line.
        ValueError: the options do not go with the format.
    """
    reader = options.reader(format, bad)
    for file in source_files(path, format):
        if format != "interactions":
            yield from read_reviews(str(file), blocks(file), reader)
            if file.stat().st_size == 0:
                raise DataError(f"{file}: empty: expected a review a line")
        elif is_parquet(file.name):
            yield from read_parquet(str(file), file, reader)
        else:
            yield from read_text(str(file), blocks(file), reader)


def source_files(path: Path, format: str) -> list[Path]:
    """The path itself, or a folder's files that `read_log` reads, in its order. Raises DataError
    where there are none."""
    check_readable(path)
    if not path.is_dir():
        return [path]
    files = {file.name: file for file in path.iterdir() if file.is_file()}
    return [files[name] for name in log_names(files, format, str(path))]


def log_names(names: Iterable[str], format: str | None, place: str) -> list[str]:
    """Those of a folder's names that belong to a log of this format (None: of any), sorted; hidden
    ones do not. Raises DataError where there are none."""
    endings: tuple[str, ...] = TABLE_ENDINGS if format == "interactions" else JSON_ENDINGS
    endings = (*TABLE_ENDINGS, *JSON_ENDINGS) if format is None else endings
    found = sorted(
        name for name in names if ending_of(name) in endings and not name.startswith((".", "_"))
    )
    if not found:
        raise DataError(f"{place}: no file that ends in .{', .'.join(endings)}: check the path")
    return found


def ending_of(name: str) -> str:
    """In lower case and without a `.gz` behind it."""
    return name.lower().removesuffix(".gz").rpartition(".")[2]


def guess_format(path: Path) -> Format:
    """By name and first line; `sequences` where nothing speaks against it. Raises DataError as
    `blocks`."""
    if not path.is_dir():
        return guess_by_name(path.name, lambda: _first_line(path))
    if (path / "dataset.json").exists():
        return "data"
    endings = (*TABLE_ENDINGS, *JSON_ENDINGS)
    first = min((file for file in path.iterdir() if ending_of(file.name) in endings), default=None)
    if first is None:
        return "interactions"
    return guess_by_name(first.name, lambda: _first_line(first))


def guess_by_name(name: str, first_line: Callable[[], bytes]) -> Format:
    """The format of a file. `first_line`: called only where the name does not tell."""
    if ending_of(name) in TABLE_ENDINGS:
        return "interactions"
    if ending_of(name) not in JSON_ENDINGS:
        return "sequences"
    # Yelp's reviews name a business, Amazon's anything else; the reader tells what a line lacks.
    line = first_line()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "amazon"
    return "yelp" if isinstance(record, dict) and "business_id" in record else "amazon"


def _first_line(path: Path) -> bytes:
    return next((block.data.lstrip().partition(b"\n")[0] for block in blocks(path)), b"")
