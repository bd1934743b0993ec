"""A table of any kind as one record per row: Parquet, JSON lines, or text with any delimiter."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.errors import DataError
from genrec_shards.readers.python_literals import parsed_line
from genrec_shards.readers.read_log import JSON_ENDINGS, ending_of
from genrec_shards.readers.tabular import delimiter_of, is_parquet, separator_of
from genrec_shards.readers.text_blocks import blocks, check_readable, unreadable

_LONGEST_CELL = 1 << 24
_MOVIELENS = ("item", "title")
"""Names of the first cells of a text with `::`, which has no line of names."""


def read_records(path: Path, by_place: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) one after another; the line of a Parquet file is its row, from 1.

    JSON lines may be Python's, as in Amazon's 2014 release; nothing is run.

    Args:
        path: a file; of text also gzipped or zipped.
        by_place: the cells of a text have the names 0, 1, ..., and its first line is a row.

    Raises:
        DataError: one line with file, line and remedy.
    """
    check_readable(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder: give one file")
    if is_parquet(path.name):
        yield from _parquet_records(path)
        return
    try:
        with _opened(path) as file:
            first = next((line for line in file if line.strip()), "")
        with _opened(path) as file:
            if ending_of(path.name) in JSON_ENDINGS or first.lstrip().startswith("{"):
                yield from _json_records(path, file)
            else:
                yield from _text_records(path, file, delimiter_of(first), by_place)
    except UnicodeDecodeError:
        remedy = "save it as UTF-8, as `iconv -f latin1 -t utf-8` does of older texts"
        raise DataError(f"{path}: not UTF-8 text: {remedy}") from None


def _opened(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(_Pieces(path)), encoding="utf-8-sig", newline="")


class _Pieces(io.RawIOBase):
    """The unpacked bytes of a file, as something that text can be read from."""

    def __init__(self, path: Path) -> None:
        self.pieces = (block.data for block in blocks(path))
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        self.rest = self.rest or next(self.pieces, b"")
        data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(8192):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        # Arrow reports damage as an OSError too, of several lines; and Python has no date for some
        # of Arrow's.
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not readable as Parquet ({reason}): save it again") from None


def _text_records(
    path: Path, file: io.TextIOWrapper, delimiter: str, by_place: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    # A line of one name has no delimiter; what comes below it may hold spaces.
    separator = separator_of("," if delimiter == " " else delimiter)
    lines = (line.replace(delimiter, separator) for line in file) if delimiter == "::" else file
    before = csv.field_size_limit(_LONGEST_CELL)
    # MovieLens' titles may begin with a quote, which quotes nothing.
    quoting: Any = csv.QUOTE_NONE if delimiter == "::" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=separator, strict=True, quoting=quoting)
    names: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if names is None:
                names = row
                if by_place or delimiter == "::":
                    names = [str(place) for place in range(len(row))]
                if delimiter == "::" and not by_place:
                    names[: len(_MOVIELENS)] = _MOVIELENS[: len(row)]
                if names is row:
                    continue
            if len(row) > len(names):
                complaint = "more cells than the first line has columns: mend the line"
                raise DataError(f"{path}:{reader.line_num}: {complaint}")
            row += [""] * (len(names) - len(row))
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        complaint = f"not readable as CSV ({error}): mend the line"
        raise DataError(f"{path}:{reader.line_num}: {complaint}") from None
    finally:
        csv.field_size_limit(before)


def _json_records(path: Path, file: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        record = parsed_line(line)
        if not isinstance(record, dict):
            complaint = "not an object in JSON: expected one item per line; mend the line"
            raise DataError(f"{path}:{number}: {complaint}")
        yield number, record
