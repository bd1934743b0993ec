"""Reviews as one object a line, gzipped or not, of which three fields are read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.frames import frame, frame_one_by_one, has_gaps, polars
from genrec_shards.readers.python_literals import parsed_line
from genrec_shards.readers.tabular import log_files
from genrec_shards.readers.text_blocks import Block, blocks
from genrec_shards.timestamps import Clock

if TYPE_CHECKING:
    import polars as pl

JSON_ENDINGS = ("json", "jsonl", "ndjson")
_PLAIN_ID = r"^[A-Za-z0-9_-]*[A-Z0-9_-][A-Za-z0-9_-]*$"
Fields = tuple[str, str, str]
"""Names of user, item and time."""


def read_json_lines(
    path: Path, releases: Sequence[Fields], format: str, bad: BadLines, clock: Clock
) -> Iterator[pl.DataFrame]:
    """Frames (`frames.py`) of a file, or of a folder's files by name.

    `releases`: the fields of each release; that of the first object counts for its file. Raises
    DataError, one line with file and line."""
    for file in log_files(path, JSON_ENDINGS):
        yield from read_reviews(str(file), blocks(file), releases, format, bad, clock)
        if file.stat().st_size == 0:
            raise DataError(f"{file}: empty: expected a review a line")


def read_reviews(
    path: str,
    found: Iterator[Block],
    releases: Sequence[Fields],
    format: str,
    bad: BadLines,
    clock: Clock,
    fields: Fields | None = None,
) -> Iterator[pl.DataFrame]:
    """Frames of a file's blocks. `path`: its name in messages; `fields`: of the release, where
    earlier blocks told it."""
    for block in found:
        fields = fields or release_of(block, releases)
        if fields is None:
            rows = ((line, _told(record, format, releases)) for line, record in _records(block))
            yield frame_one_by_one(path, rows, clock, bad)
            continue
        fast = _fast(block, fields, clock)
        yield (
            fast
            if fast is not None
            else frame_one_by_one(path, _rows(block, fields, format), clock, bad)
        )


def release_of(block: Block, releases: Sequence[Fields]) -> Fields | None:
    """The fields of the block's first object that has those of a release."""
    for _, record in _records(block):
        if isinstance(record, dict):
            for fields in releases:
                if record.keys() >= set(fields):
                    return fields
    return None


def _fast(block: Block, fields: Fields, clock: Clock) -> pl.DataFrame | None:
    """All rows at once, or None where one of them must be looked at."""
    pl = polars()
    lines = sum(1 for line in block.data.split(b"\n") if line.strip())
    for kind in (pl.Int64, pl.String):
        try:
            found = pl.read_ndjson(
                io.BytesIO(block.data),
                schema={fields[0]: pl.String, fields[1]: pl.String, fields[2]: kind},
            )
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            continue
        if found.height != lines:
            return None
        # Polars spells lists, truth values and fractions as text too, and replaces half a surrogate
        # pair. Ids come first: the time of a row without them settles no unit.
        if any(
            found[name].null_count() or not found[name].str.contains(_PLAIN_ID).all()
            for name in fields[:2]
        ):
            continue
        rows = frame(found[fields[0]], found[fields[1]], clock.column(found[fields[2]]))
        if not has_gaps(rows):
            return rows
    return None


def _rows(
    block: Block, fields: Fields, format: str
) -> Iterator[tuple[int, tuple[Any, Any, Any] | str]]:
    for line, record in _records(block):
        missing = (
            next((name for name in fields if name not in record), None)
            if isinstance(record, dict)
            else None
        )
        if isinstance(record, dict) and missing is None:
            yield line, (record[fields[0]], record[fields[1]], record[fields[2]])
        else:
            yield line, _told(record, format, [fields])


def _told(record: Any, format: str, releases: Sequence[Fields]) -> str:
    """What is wrong with a line that is no review."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return f"no object in JSON, and --format {format} has one a line"
    wanted = " or ".join(", ".join(fields) for fields in releases)
    listed = ", ".join(str(name)[:40] for name in list(record)[:8]) or "nothing"
    return f"no review of --format {format}: fields {wanted} are needed, it has {listed}"


def _records(block: Block) -> Iterator[tuple[int, Any]]:
    """(line, what it says), a text where its bytes are none; blank lines are nothing."""
    for line, data in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not data.strip():
            continue
        if b"\0" in data:
            yield line, "binary (a zero byte)"
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield line, f"not UTF-8 (byte 0x{data[error.start]:02x})"
            continue
        record = parsed_line(text)
        yield line, record if isinstance(record, dict) else None


AMAZON_RELEASES: tuple[Fields, ...] = (
    (
        "reviewerID",
        "asin",
        "unixReviewTime",
    ),  # 2014, some lines in Python's spelling, and 2018: seconds
    (
        "user_id",
        "parent_asin",
        "timestamp",
    ),  # 2023: milliseconds; variants of a product share its parent
)


def read_amazon(path: Path, bad: BadLines, clock: Clock) -> Iterator[pl.DataFrame]:
    """Frames of reviews, as `read_json_lines`."""
    return read_json_lines(path, AMAZON_RELEASES, "amazon", bad, clock)


YELP_RELEASES: tuple[Fields, ...] = (("user_id", "business_id", "date"),)


def read_yelp(path: Path, bad: BadLines, clock: Clock) -> Iterator[pl.DataFrame]:
    """Frames of reviews, as `read_json_lines`; dates are taken as UTC."""
    return read_json_lines(path, YELP_RELEASES, "yelp", bad, clock)
