"""Which format a source is in, by name and content, and in words what it was read as."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.columns import COLUMNS, NAME_THEM, find_columns, plain_name
from genrec_shards.readers.frames import listed
from genrec_shards.readers.json_reviews import release_of
from genrec_shards.readers.read_log import (
    JSON_ENDINGS,
    TABLE_ENDINGS,
    Format,
    LogOptions,
    ending_of,
    first_blocks,
    holds_objects,
    source_files,
)
from genrec_shards.readers.tabular import (
    DELIMITERS,
    OTHER_DELIMITERS,
    column_places,
    delimiter_of,
    is_parquet,
    is_recent,
    read_header,
    row_places,
)
from genrec_shards.readers.text_blocks import Block, unpacked, whole_lines

LINES_LOOKED_AT = 100
_NAMES = DELIMITERS | OTHER_DELIMITERS
_AS_SEQUENCES = "--format sequences where each line is `user item item ...`"
_ID = re.compile(r"(?=.*\d|..?$)[\w.:@/+=-]+")
"""What looks like an id: it has a digit or at most two characters, and no brackets or quotes."""

OpenFile = Callable[[], BinaryIO]
"""Opens a file of this machine or behind an address."""


# Which format


def guess_format(path: Path, columns: Sequence[str] | None = None) -> Format:
    """The format of a file or folder.

    Args:
        path: the source, which is there.
        columns: what the user named the columns by; only `interactions` have some.

    Raises:
        DataError: the content does not tell; the line names the option that does.
    """
    if not path.is_dir():
        return guess_of_file(str(path), lambda: path.open("rb"), columns)
    if (path / "dataset.json").exists():
        return "data"
    endings = (*TABLE_ENDINGS, *JSON_ENDINGS)
    first = min((file for file in path.iterdir() if ending_of(file.name) in endings), default=None)
    if first is None:
        return "interactions"
    return guess_of_file(str(first), lambda: first.open("rb"), columns)


def guess_of_file(place: str, open_file: OpenFile, columns: Sequence[str] | None = None) -> Format:
    """As `guess_format`, of one file. `place`: its path or address, as messages name it."""
    ending = ending_of(place)
    if columns is not None or ending in TABLE_ENDINGS:
        return "interactions"
    if ending == "tar" or place.lower().endswith(".tgz"):
        raise DataError(f"{place}: an archive of files: unpack it and give the log or its folder")
    first = _beginning(place, open_file)
    if ending in JSON_ENDINGS or holds_objects(first):
        return _guess_of_objects(place, first)
    lines = [line for block in first for line in block.data.split(b"\n") if line.strip()]
    texts = [line.decode(errors="replace").strip("\r") for line in lines[:LINES_LOOKED_AT]]
    if texts and "\0" not in texts[0]:
        return _guess_of_text(place, texts)
    return "sequences"  # whose reader says what is wrong with it


def _beginning(place: str, open_file: OpenFile) -> list[Block]:
    with open_file() as raw:
        return first_blocks(whole_lines(place, unpacked(place, raw)))


def _guess_of_objects(place: str, first: Sequence[Block]) -> Format:
    if not first:
        return "amazon"  # whose reader says what is wrong with it
    if first[-1].data.lstrip().startswith(b"["):
        remedy = "write one object a line, as `jq -c '.[]'` does"
        raise DataError(f"{place}:1: one array of JSON, and a log has one object a line: {remedy}")
    formats: tuple[Format, ...] = ("yelp", "amazon", "interactions")
    for format in formats:
        if release_of(first[-1], LogOptions().reader(format, BadLines())) is not None:
            return format
    line = first[-1].data.lstrip().partition(b"\n")[0]
    # The readers say what is missing: that of interactions names --columns.
    return "yelp" if b"business_id" in line else "interactions" if b"{" in line else "amazon"


def _guess_of_text(place: str, lines: Sequence[str]) -> Format:
    """The format of a text whose name does not tell: `interactions` where the first line names the
    columns or has `::`, `sequences` where each line is words of ids with spaces between them."""
    delimiter = delimiter_of(lines[0])
    cells = [cell.strip(' "') for cell in lines[0].split(None if delimiter == " " else delimiter)]
    num_missing = find_columns(cells, None).count(None)
    if delimiter == "::" or num_missing == 0 or (delimiter != " " and num_missing < 3):
        return "interactions"  # whose reader names what is missing
    for number, line in enumerate(lines, start=1):
        found = delimiter_of(line)
        if found != " ":
            row = row_places(cells)
            places = "USER,ITEM,TIME" if row is None else ",".join(map(str, row))
            raise DataError(
                f"{place}:{number}: {_NAMES[found]} in it, and no names of columns above: give "
                f"--columns {places} where it is a table of user, item and time, or {_AS_SEQUENCES}"
            )
    usual = {name for names in COLUMNS.values() for name in names}
    words = [line.split() for line in lines]
    ids = [word for line in words for word in (line[1:] or line)]
    if sum(bool(_ID.fullmatch(word)) for word in ids) * 2 < len(ids):
        looks = "most of its words hold no digit, so they look like text and not like ids"
        remedy = f"give {_AS_SEQUENCES}, or --items FILE where it describes the items"
        raise DataError(f"{place}:1: {looks}: {remedy}")
    if any(plain_name(word) in usual for word in words[0] if not re.search(r"\d", word)):
        looks = "names of columns, not all of user, item and time"
        remedy = f"{NAME_THEM}, or remove the line and give {_AS_SEQUENCES}"
        raise DataError(f"{place}:1: {looks}: {remedy}")
    if (place_of_time := _only_time(words)) is not None:
        looks = f"each line has {len(words[0])} words, and one is a time, as in a table"
        remedy = f"give --columns 0,1,{place_of_time}, or {_AS_SEQUENCES}"
        raise DataError(f"{place}:1: {looks}: {remedy}")
    return "sequences"


def _only_time(words: Sequence[Sequence[str]]) -> int | None:
    """The place, behind user and item, of the one word that is a time of our days in every line;
    None where lines have several or none, or not one number of words."""
    if len(words[0]) < 3 or len({len(line) for line in words}) > 1:
        return None
    times = [at for at in range(1, len(words[0])) if all(is_recent(line[at]) for line in words)]
    return times[0] if len(times) == 1 and times[0] > 1 else None


# In words


def read_as(path: Path, format: str, columns: Sequence[str] | None = None) -> str:
    """What a file, or a folder's first file, was read as: format, kind of file and columns, in
    words.

    Args:
        path: the source, which has been read without an error.
        format: that it was read in.
        columns: what the user named the columns by.
    """
    first = source_files(path, format)[0]
    return file_read_as(str(first), lambda: first.open("rb"), format, columns)


def file_read_as(
    place: str, open_file: OpenFile, format: str, columns: Sequence[str] | None = None
) -> str:
    """The same of one file. `place`: its path or address."""
    if format == "sequences":
        return "sequences: `user item item ...` a line, oldest item first, without times"
    if format == "interactions" and is_parquet(place):
        with open_file() as raw, pq.ParquetFile(raw) as file:
            names = list(file.schema_arrow.names)
        return "interactions: Parquet, " + _places_in_words(
            "column", [names[at] for at in column_places(place, names, columns)]
        )
    first = _beginning(place, open_file)
    if format != "interactions" or holds_objects(first):
        reader = LogOptions(None if columns is None else tuple(columns)).reader(format, BadLines())
        fields = release_of(first[-1], reader) if first else None
        kind = "JSON lines" if format == "interactions" else "reviews in JSON lines"
        return f"{format}: {kind}, {_places_in_words('field', fields)}"
    header, _ = read_header(place, first[0], columns)
    names = header.names or [str(at) for at in range(header.width)]
    chosen = [names[at].strip() for at in header.places]
    kind = f"text with {_NAMES[header.delimiter]} between cells"
    if header.names is None:
        kind += " and no names above"
    elif ":" in chosen[0]:
        kind = f"RecBole's atomic file, {kind}"
    return f"interactions: {kind}, {_places_in_words('column', chosen)}"


def _places_in_words(unit: str, names: Sequence[str] | None) -> str:
    if names is None:
        return f"one {unit} each for users, items and times"
    user, item, time = (listed([name], 1) for name in names)
    return f"users in {unit} {user}, items in {item}, times in {time}"
