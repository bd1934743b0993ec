"""Logs with a column each of users, items and times: CSV and its kin, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.errors import DataError
from genrec_shards.readers.columns import COLUMNS, NAME_THEM, find_columns
from genrec_shards.readers.frames import LogReader, listed, polars
from genrec_shards.readers.text_blocks import (
    BLOCK_BYTES,
    LONGEST_LINE,
    Block,
    find_fault,
    unreadable,
)
from genrec_shards.timestamps import Clock

if TYPE_CHECKING:
    import polars as pl

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
OTHER_DELIMITERS = {"::": "`::`", " ": "spaces"}
"""`::` is MovieLens-1M's; spaces are taken where a line has none of the others."""
_UNIT_SEPARATOR = "\x1f"
"""In place of `::`, because readers of CSV know delimiters of one character."""
_RECENT = 100_000_000 * 1_000_000
"""Microseconds since 1970, in 1973: a larger number is hardly an id or a rating."""
ROWS_PER_BATCH = 1 << 16
LONGEST_JOINED = max(LONGEST_LINE, 4 * BLOCK_BYTES)
"""Bytes of blocks that are joined until their quotes are even."""


def is_parquet(name: str) -> bool:
    """By the ending of a file's name."""
    return name.lower().endswith(".parquet")


def _are_places(columns: Sequence[str] | None) -> bool:
    """Whether the columns are named by whole numbers."""
    return columns is not None and all(
        name.isascii() and name.isdigit() and len(name) < 6 for name in columns
    )


def column_places(path: str, names: list[str], columns: Sequence[str] | None) -> list[int]:
    """Which of the names are those of users, items and times."""
    if columns is not None and _are_places(columns) and not set(columns) <= set(names):
        places = [int(name) for name in columns]
        if max(places) < len(names):
            return places
        reason = f"no column {max(places)}, only 0 to {len(names) - 1}"
        raise DataError(f"{path}:1: {reason}: mend --columns USER,ITEM,TIME")
    found = find_columns(names, columns)
    places = [place for place in found if place is not None]
    if len(places) == len(found):
        return places
    missing = found.index(None)
    kind = list(COLUMNS)[missing]
    wanted = f"column of {kind}" if columns is None else f"column {columns[missing]}"
    remedy = f"{NAME_THEM}, by places from 0 where the first line is a row"
    if columns is None and kind == "times":
        remedy += "; without times give --format sequences, one user a line, oldest item first"
    raise DataError(f"{path}:1: no {wanted}, only {listed(names, 12) or 'none'}: {remedy}")


def row_places(cells: Sequence[str]) -> list[int] | None:
    """Where user, item and time seem to be in a first line that is a row; None where it may be
    names: no cell is a number or a date.

    Example: 196, 242, 3, 881250949 gives 0, 1, 3.
    """
    if len(cells) < 3 or all(isinstance(Clock().micros(cell.strip()), str) for cell in cells):
        return None
    times = [at for at, cell in enumerate(cells) if is_recent(cell)]
    time = times[-1] if times else len(cells) - 1
    user, item = [at for at in range(len(cells)) if at != time][:2]
    return [user, item, time]


def is_recent(cell: str) -> bool:
    """Whether a cell is a time of our days."""
    micros = Clock().micros(cell.strip())
    return isinstance(micros, int) and micros > _RECENT


# Text


@dataclass(frozen=True)
class Header:
    """What the first line of a text file tells."""

    width: int
    """Cells of a line."""
    delimiter: str
    places: list[int]
    """Cells of user, item and time, from 0."""
    names: list[str] | None
    """Of all columns; None where the first line is a row."""

    @property
    def separator(self) -> str:
        """As `separator_of`."""
        return separator_of(self.delimiter)


def read_text(
    path: str, found: Iterator[Block], reader: LogReader, header: Header | None = None
) -> Iterator[pl.DataFrame]:
    """Frames of a text's blocks.

    Its first line has the columns' names, unless `reader.columns` are whole numbers: these are
    places, from 0, and every line is a row. A file with `::` need not have names where a cell of
    its first line is a time: the first two others are user and item. Cells are separated by what
    `delimiter_of` finds in the first line and may be quoted, and then may hold line ends. A row
    with more cells than the first line is bad, so is one without user, item or time.

    Args:
        path: the file, as messages name it.
        found: its blocks.
        reader: of the whole log.
        header: of the file's first line, where that is not among the blocks.

    Raises:
        DataError: one line with file and line.
    """
    for block in with_whole_cells(found):
        if header is None:
            header, block = read_header(path, block, reader.columns)
        if not block.data.strip():
            continue
        if header.delimiter == "::":
            block = Block(block.first_line, block.data.replace(b"::", _UNIT_SEPARATOR.encode()))
        frame = _fast_frame(block, header, reader)
        yield reader.frame_one_by_one(path, _rows(block, header)) if frame is None else frame
    if header is None:
        raise DataError(f"{path}: empty: expected a first line with the columns' names")


def read_header(path: str, block: Block, columns: Sequence[str] | None) -> tuple[Header, Block]:
    """What a file's first line tells, and the rows of its first block."""
    line, _, rest = block.data.partition(b"\n")
    if (fault := find_fault(line)) is not None:
        binary = fault[1].startswith("binary")
        names_text = "expected text with the columns' names, plain or gzipped"
        remedy = names_text if binary else "save it as UTF-8 text"
        raise DataError(f"{path}:1: {fault[1]}: {remedy}")
    delimiter = delimiter_of(line.decode())
    separator = separator_of(delimiter)
    text = line.decode().rstrip("\r").replace(delimiter, separator)
    try:
        names = next(csv.reader([text], delimiter=separator, strict=True), [])
    except csv.Error as error:
        fault_text = f"the columns' names are not readable as CSV ({error})"
        raise DataError(f"{path}:1: {fault_text}: mend the line") from None
    if _are_places(columns):
        # These cells are a row, whatever they say: they name no column.
        places = column_places(path, [""] * len(names), columns)
        return Header(len(names), delimiter, places, None), block
    named = None not in find_columns(names, columns)
    if not named and (row := row_places(names)) is not None:
        if delimiter == "::" and columns is None and is_recent(names[row[2]]):
            return Header(len(names), delimiter, row, None), block
        cells = listed(names, 8)
        found = ",".join(map(str, row))
        remedy = f"give the places of user, item and time, as --columns {found}"
        raise DataError(
            f"{path}:1: the first line is a row and names no column ({cells}): {remedy}"
        )
    return Header(len(names), delimiter, column_places(path, names, columns), names), Block(2, rest)


def delimiter_of(line: str) -> str:
    """What separates the cells of a line: `::` where it is there twice, else the most frequent of
    DELIMITERS, else a space."""
    if line.count("::") >= 2:
        return "::"
    found = max(DELIMITERS, key=line.count)
    return found if found in line else " "


def separator_of(delimiter: str) -> str:
    """One character for a delimiter: `::` has another in its place while a text is read."""
    return _UNIT_SEPARATOR if delimiter == "::" else delimiter


def with_whole_cells(found: Iterator[Block]) -> Iterator[Block]:
    """Blocks joined until their quotes are even, so that no quoted cell is cut; LONGEST_JOINED ends
    the joining where a stray quote makes them odd."""
    waiting: Block | None = None
    for block in found:
        block = block if waiting is None else Block(waiting.first_line, waiting.data + block.data)
        if block.data.count(b'"') % 2 and len(block.data) < LONGEST_JOINED:
            waiting = block
            continue
        waiting = None
        yield block
    if waiting is not None:
        yield waiting


def _fast_frame(block: Block, header: Header, reader: LogReader) -> pl.DataFrame | None:
    """All rows at once, or None where one of them is to be looked at."""
    pl = polars()
    data = block.data.rstrip(b"\r\n")
    # A quote that neither begins nor ends a cell: readers of CSV differ about it.
    sign = re.escape(header.separator.encode())
    stray_quote = b'[^\n"' + sign + b']"[^\r\n"' + sign + b"]"
    if b"\0" in data or (b'"' in data and re.search(stray_quote, data)):
        return None
    schema = {str(place): pl.String for place in range(header.width)}
    try:
        cells = pl.read_csv(
            io.BytesIO(data), has_header=False, separator=header.separator, schema=schema
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
    if cells.height != data.count(b"\n") + 1:
        return None
    return reader.frame(*(cells[str(place)] for place in header.places))


def _rows(block: Block, header: Header) -> Iterator[tuple[int, tuple[str, str, str] | str]]:
    """(line, cells of the three columns or what is wrong), one by one; blank lines are left out."""
    lines = block.data.split(b"\n")
    at = 0
    while at < len(lines):
        end = at + 1
        if lines[at].strip():
            row = _cells(lines[at], header)
            quotes = lines[at].count(b'"')
            if isinstance(row, str) and quotes % 2:
                # A quoted cell may go on in the next lines; if that leads to no row, this line
                # alone is bad.
                while quotes % 2 and end < len(lines):
                    quotes += lines[end].count(b'"')
                    end += 1
                longer = _cells(b"\n".join(lines[at:end]), header)
                row, end = (row, at + 1) if isinstance(longer, str) else (longer, end)
            yield block.first_line + at, row
        at = end


def _cells(data: bytes, header: Header) -> tuple[str, str, str] | str:
    """The cells of user, item and time, or what is wrong with the row."""
    if (fault := find_fault(data)) is not None:
        return fault[1]
    text = io.StringIO(data.decode().removesuffix("\r"), newline="")
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        found = list(csv.reader(text, delimiter=header.separator, strict=True))
    except csv.Error as error:
        return f"not readable as CSV ({error})"
    finally:
        csv.field_size_limit(limit)
    if len(found) != 1:
        return "not readable as CSV (a line end within a line)"
    if len(found[0]) > header.width:
        return f"{len(found[0])} cells, the first line has {header.width}"
    cells = found[0] + [""] * (header.width - len(found[0]))
    user, item, time = (cells[place] for place in header.places)
    return user, item, time


# Parquet


def read_parquet(
    path: str,
    source: Path | BinaryIO,
    reader: LogReader,
    groups: Sequence[int] | None = None,
    first: int = 1,
) -> Iterator[pl.DataFrame]:
    """Frames of a Parquet file.

    Args:
        path: the file, as messages name it.
        source: where it is read.
        reader: of the whole log.
        groups: row groups; None: all.
        first: number of the first group's first row.
    """
    try:
        with pq.ParquetFile(source) as file:
            names = list(file.schema_arrow.names)
            chosen = [names[place] for place in column_places(path, names, reader.columns)]
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=chosen):
                yield _frame_of_batch(path, first, [batch.column(name) for name in chosen], reader)
                first += batch.num_rows
    except (pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not readable as Parquet ({reason}): save it again") from None


def _usable(kind: Any) -> bool:
    """Whether ids come in this Arrow type, and times that are no dates."""
    usable = ("string", "large_string", "string_view", "integer", "float32", "float64", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in usable)


def _frame_of_batch(path: str, first: int, columns: list[Any], reader: LogReader) -> pl.DataFrame:
    pl = polars()
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in columns]
    dates = None
    if pa.types.is_timestamp(columns[2].type) or pa.types.is_date(columns[2].type):
        dates, columns[2] = _dates(path, columns[2]), pa.nulls(len(columns[2]))
    for kind, column in zip(COLUMNS, columns, strict=True):
        if not _usable(column.type):
            expected = f"expected text{', dates' * (kind == 'times')} or whole numbers"
            raise DataError(f"{path}: the column of {kind} is {column.type}: {expected}")
    users, items, times = (
        pl.Series(name, pl.from_arrow(column)) for name, column in zip("uit", columns, strict=True)
    )
    if dates is not None:
        # The limits are in the column's own unit: in another one a far date would wrap around.
        first_day, end = np.array(["1970-01-01", "2100-01-01"], "<M8[D]").astype(dates.dtype)
        inside = (dates >= first_day) & (dates < end)
        times = pl.Series("t", np.where(inside, dates, np.datetime64("NaT")).astype("<M8[us]"))
    if all(ids.dtype == pl.String or ids.dtype.is_integer() for ids in (users, items)):
        found = reader.frame(users, items, times)
        if found is not None:
            return found
    texts = times.to_list() if dates is None else np.datetime_as_string(dates).tolist()
    times_or_none = [None if text == "NaT" else text for text in texts]
    rows = zip(users.to_list(), items.to_list(), times_or_none, strict=True)
    return reader.frame_one_by_one(path, enumerate(rows, start=first))


def _dates(path: str, column: Any) -> np.ndarray:
    """datetime64 in UTC, in the column's own unit: numpy has a date for every number."""
    pl = polars()
    zone: Any = getattr(column.type, "tz", None)
    try:
        pl.Series([], dtype=pl.Datetime("us", zone))
    except pl.exceptions.PolarsError:
        kind = f"the column of times has the time zone {zone[:40]!r}, which nobody knows"
        raise DataError(f"{path}: {kind}: save it in UTC") from None
    dates: np.ndarray = column.to_numpy(zero_copy_only=False)
    return dates
