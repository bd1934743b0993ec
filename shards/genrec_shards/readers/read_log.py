"""A log of any format as frames: which of its files are read, and how each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.frames import LogReader
from genrec_shards.readers.json_reviews import read_reviews
from genrec_shards.readers.tabular import is_parquet, read_parquet, read_text
from genrec_shards.readers.text_blocks import Block, blocks, check_readable
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
            raise ValueError(
                f"columns {names}: give three names, as userId,movieId,timestamp, or the places of "
                "three, as 0,1,3"
            )
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
        if format == "interactions" and is_parquet(file.name):
            yield from read_parquet(str(file), file, reader)
            continue
        found = blocks(file)
        first = first_blocks(found)
        if format != "interactions" or holds_objects(first):
            yield from read_reviews(str(file), chain(first, found), reader)
        else:
            yield from read_text(str(file), chain(first, found), reader)
        if file.stat().st_size == 0 and format != "interactions":
            raise DataError(f"{file}: empty: expected a review a line")


def first_blocks(found: Iterator[Block]) -> list[Block]:
    """The first block that is not blank, after those before it; fewer where the file ends."""
    first = []
    for block in found:
        first.append(block)
        if block.data.strip():
            break
    return first


def holds_objects(first: Sequence[Block]) -> bool:
    """Whether a text with these `first_blocks` is objects in JSON and not a table."""
    return bool(first) and first[-1].data.lstrip().startswith(b"{")


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
    ones do not. `interactions` are its tables, or where it has none its JSON lines. Raises
    DataError where there are none."""
    shown = sorted(name for name in names if not name.startswith((".", "_")))
    tables = [name for name in shown if ending_of(name) in TABLE_ENDINGS]
    objects = [name for name in shown if ending_of(name) in JSON_ENDINGS]
    if format is None:
        found = sorted(tables + objects)
    else:
        found = (tables or objects) if format == "interactions" else objects
    if not found:
        endings = JSON_ENDINGS if format in ("amazon", "yelp") else (*TABLE_ENDINGS, *JSON_ENDINGS)
        remedy = "check the path, or give one file of another name"
        raise DataError(f"{place}: no file that ends in .{', .'.join(endings)}: {remedy}")
    return found


def ending_of(name: str) -> str:
    """In lower case and without a `.gz` or `.zip` behind it."""
    return name.lower().removesuffix(".gz").removesuffix(".zip").rpartition(".")[2]
