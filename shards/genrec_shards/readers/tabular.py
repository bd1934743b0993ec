"""Logs with a column each of users, items and times: CSV and its kin, Parquet, folders of
either."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.frames import frame, frame_one_by_one, has_gaps, polars
from genrec_shards.readers.text_blocks import BLOCK_BYTES, LONGEST_LINE, Block, blocks, readable
from genrec_shards.timestamps import Clock

if TYPE_CHECKING:
    import polars as pl

COLUMNS = (
    ("user", "user_id", "userid", "reviewerid", "customer_id", "visitorid", "uid"),
    (
        "item",
        "item_id",
        "itemid",
        "parent_asin",
        "asin",
        "business_id",
        "product_id",
        "productid",
        "movieid",
        "iid",
    ),
    ("timestamp", "time", "date", "datetime", "unixreviewtime", "ts"),
)
"""Where users, items and times are looked for, in this order, unless columns are named; capitals do
not matter, and what stands behind a colon, as in RecBole's `user_id:token`, neither."""
ENDINGS = ("csv", "tsv", "inter", "parquet")
KINDS = ("users", "items", "times")
DELIMITERS = (",", "\t", ";", "|")
ROWS_A_BATCH = 1 << 16
LONGEST_JOINED = max(LONGEST_LINE, 4 * BLOCK_BYTES)
"""Bytes of blocks that are joined until their quotes are even."""


def read_interactions(
    path: str | Path, bad: BadLines, clock: Clock, columns: Sequence[str] | None = None
) -> Iterator[pl.DataFrame]:
    """Frames (`frames.py`) of a file, or of all files of a folder in the order of their names.

    `columns`: the names of the columns of users, items and times; None looks for COLUMNS. Whole
    numbers are places, from 0: a text file then has no line with names. Else text files have a
    first line with names. They are separated by one of DELIMITERS (told by the first line), may be
    gzipped and may quote cells, which then may hold line ends. A row with more cells than the first
    line is bad, so is one without user, item or time. Raises DataError, one line with file and
    line."""
    for file in log_files(Path(path), ENDINGS):
        if is_parquet(file.name):
            yield from read_parquet(str(file), file, bad, clock, columns)
        else:
            yield from read_text(str(file), blocks(file), bad, clock, columns)


def is_parquet(name: str) -> bool:
    """By the ending of a file's name."""
    return name.lower().endswith(".parquet")


def log_files(path: Path, endings: Sequence[str]) -> list[Path]:
    """The path itself, or a folder's files of these endings, `.gz` or not, by name; hidden ones are
    left out."""
    readable(path)
    if not path.is_dir():
        return [path]
    found = sorted(
        file for file in path.iterdir()
        if file.is_file() and _ending(file) in endings and not file.name.startswith((".", "_"))
    )  # fmt: skip
    if not found:
        raise DataError(f"{path}: no file that ends in .{', .'.join(endings)}: check the path")
    return found


def _ending(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _are_places(columns: Sequence[str] | None) -> bool:
    return columns is not None and all(
        name.isascii() and name.isdigit() and len(name) < 6 for name in columns
    )


def _places(path: str, names: list[str], columns: Sequence[str] | None) -> list[int]:
    """Where users, items and times stand among the names."""
    places: list[int] = []
    if columns is not None and _are_places(columns) and not set(columns) <= set(names):
        places = [int(name) for name in columns]
        if max(places) >= len(names):
            raise DataError(
                f"{path}:1: no column {max(places)}, only 0 to {len(names) - 1}: mend --columns USER,ITEM,TIME"
            )
        return places
    known = [name.strip().partition(":")[0].lower() for name in names]
    for number, kind in enumerate(KINDS):
        if columns is not None:
            place = names.index(columns[number]) if columns[number] in names else None
            wanted = f"column {columns[number]}"
        else:
            place = next((known.index(name) for name in COLUMNS[number] if name in known), None)
            wanted = f"column of {kind}"
        if place is None:
            listed = ", ".join(name[:40] for name in names[:12]) or "none"
            raise DataError(
                f"{path}:1: no {wanted}, only {listed}: name the three with --columns USER,ITEM,TIME"
            )
        places.append(place)
    return places


# Text


def read_text(
    path: str,
    found: Iterator[Block],
    bad: BadLines,
    clock: Clock,
    columns: Sequence[str] | None,
    table: Table | None = None,
) -> Iterator[pl.DataFrame]:
    """Frames of a text's blocks. `path`: its name in messages; `table`: of its first line, where
    that is not among the blocks."""
    for block in with_whole_cells(found):
        if table is None:
            table, block = head(path, block, columns)
        if not block.data.strip():
            continue
        fast = _fast(block, table, clock)
        yield fast if fast is not None else frame_one_by_one(path, _rows(block, table), clock, bad)
    if table is None:
        raise DataError(f"{path}: empty: expected a first line with the columns' names")


class Table:
    """What the first line of a text file tells: its cells, what separates them and where the three
    columns stand."""

    def __init__(self, names: list[str], delimiter: str, places: list[int]) -> None:
        self.names, self.delimiter, self.places = names, delimiter, places
        sign = re.escape(delimiter.encode())
        self.stray_quote = re.compile(b'[^\n"' + sign + b']"[^\r\n"' + sign + b"]")
        """A quote that neither begins nor ends a cell, of which readers of CSV think
        differently."""


def head(path: str, block: Block, columns: Sequence[str] | None) -> tuple[Table, Block]:
    """The table of a file's first block, and the rows of the block."""
    line, _, rest = block.data.partition(b"\n")
    if b"\0" in line:
        raise DataError(
            f"{path}:1: binary (a zero byte): expected text with the columns' names, plain or gzipped"
        )
    try:
        text = line.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:1: not UTF-8 (byte 0x{line[error.start]:02x}): save it as UTF-8 text"
        ) from None
    delimiter = max(DELIMITERS, key=text.count)
    try:
        names = next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise DataError(
            f"{path}:1: the columns' names are not readable as CSV ({error}): mend the line"
        ) from None
    if _are_places(columns):
        # These cells are a row, whatever they say: they name no column.
        return Table(names, delimiter, _places(path, [""] * len(names), columns)), block
    return Table(names, delimiter, _places(path, names, columns)), Block(2, rest)


def with_whole_cells(pieces: Iterator[Block]) -> Iterator[Block]:
    """Blocks joined until their quotes are even, so that no quoted cell is cut; a stray quote ends
    the joining early."""
    waiting: Block | None = None
    for block in pieces:
        block = block if waiting is None else Block(waiting.first_line, waiting.data + block.data)
        if block.data.count(b'"') % 2 and len(block.data) < LONGEST_JOINED:
            waiting = block
            continue
        waiting = None
        yield block
    if waiting is not None:
        yield waiting


def _fast(block: Block, table: Table, clock: Clock) -> pl.DataFrame | None:
    """All rows at once, or None where one of them must be looked at."""
    pl = polars()
    data = block.data.rstrip(b"\r\n")
    if b"\0" in data or (b'"' in data and table.stray_quote.search(data)):
        return None
    try:
        cells = pl.read_csv(
            io.BytesIO(data),
            has_header=False,
            separator=table.delimiter,
            schema={str(place): pl.String for place in range(len(table.names))},
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
    if cells.height != data.count(b"\n") + 1:
        return None
    users, items, times = (cells[str(place)] for place in table.places)
    # Ids come first: the time of a row without them settles no unit.
    if times.null_count() or any(
        ids.null_count() or (ids.str.len_bytes() == 0).any() for ids in (users, items)
    ):
        return None
    found = frame(users, items, clock.column(times))
    return None if has_gaps(found) else found


def _rows(block: Block, table: Table) -> Iterator[tuple[int, tuple[str, str, str] | str]]:
    """(line, cells of the three columns or what is wrong), one by one; blank lines are nothing."""
    lines = block.data.split(b"\n")
    at = 0
    while at < len(lines):
        line = block.first_line + at
        if not lines[at].strip():
            at += 1
            continue
        row = _cells(lines[at], table)
        end = at + 1
        quotes = lines[at].count(b'"')
        if isinstance(row, str) and quotes % 2:
            # A quoted cell may go on in the next lines; if that leads nowhere, this line alone is
            # bad.
            while quotes % 2 and end < len(lines):
                quotes += lines[end].count(b'"')
                end += 1
            longer = _cells(b"\n".join(lines[at:end]), table)
            row, end = (row, at + 1) if isinstance(longer, str) else (longer, end)
        yield line, row
        at = end


def _cells(data: bytes, table: Table) -> tuple[str, str, str] | str:
    if b"\0" in data:
        return "binary (a zero byte)"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{data[error.start]:02x})"
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        found = list(
            csv.reader(
                io.StringIO(text.removesuffix("\r"), newline=""),
                delimiter=table.delimiter,
                strict=True,
            )
        )
    except csv.Error as error:
        return f"not readable as CSV ({error})"
    finally:
        csv.field_size_limit(limit)
    if len(found) != 1:
        return "not readable as CSV (a line end within a line)"
    if len(found[0]) > len(table.names):
        return f"{len(found[0])} cells, the first line has {len(table.names)}"
    cells = found[0] + [""] * (len(table.names) - len(found[0]))
    user, item, time = (cells[place] for place in table.places)
    return user, item, time


# Parquet


def read_parquet(
    path: str,
    source: Path | BinaryIO,
    bad: BadLines,
    clock: Clock,
    columns: Sequence[str] | None,
    groups: Sequence[int] | None = None,
    first: int = 1,
) -> Iterator[pl.DataFrame]:
    """Frames of a Parquet file. `path`: its name in messages; `groups`: row groups, all by default,
    `first` the first's row."""
    try:
        with pq.ParquetFile(source) as file:
            names = list(file.schema_arrow.names)
            chosen = [names[place] for place in _places(path, names, columns)]
            for batch in file.iter_batches(ROWS_A_BATCH, row_groups=groups, columns=chosen):
                yield _of_batch(path, first, [batch.column(name) for name in chosen], bad, clock)
                first += batch.num_rows
    except (pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}): check the path and its rights"
            ) from None
        raise DataError(
            f"{path}: not readable as Parquet ({str(error).splitlines()[0]}): save it again"
        ) from None


def _usable(kind: Any) -> bool:
    """Is this Arrow type one that ids or times come in?"""
    types = pa.types
    if types.is_dictionary(kind):
        return _usable(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    numbers = (
        types.is_integer(kind)
        or types.is_float32(kind)
        or types.is_float64(kind)
        or types.is_null(kind)
    )
    return texts or numbers or types.is_timestamp(kind) or types.is_date(kind)


def _of_batch(
    path: str, first: int, columns: list[Any], bad: BadLines, clock: Clock
) -> pl.DataFrame:
    pl = polars()
    for kind, column in zip(KINDS, columns, strict=True):
        if not _usable(column.type):
            raise DataError(
                f"{path}: the column of {kind} is {column.type}: expected text, whole numbers or times"
            )
    series = [
        pl.Series(name, pl.from_arrow(column)) for name, column in zip("uit", columns, strict=True)
    ]
    if all(kind.dtype == pl.String or kind.dtype.is_integer() for kind in series[:2]):
        # Ids come first: the time of a row without them settles no unit.
        ids = [column.cast(pl.String) for column in series[:2]]
        if not any(column.null_count() or (column.str.len_bytes() == 0).any() for column in ids):
            found = frame(ids[0], ids[1], clock.column(series[2]))
            if not has_gaps(found):
                return found
    if series[2].dtype.is_temporal():
        # Python has no date for some of Arrow's, and text says the same.
        micros = series[2].cast(pl.Datetime("us")).cast(pl.Int64)
        series[2] = micros.cast(pl.Datetime("us", "UTC")).dt.to_string("iso:strict")
    rows = zip(*(column.to_list() for column in series), strict=True)
    return frame_one_by_one(path, enumerate(rows, start=first), clock, bad)
