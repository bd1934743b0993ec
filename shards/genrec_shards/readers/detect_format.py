"""Which format a log is in, where its name and first line tell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from genrec_shards.readers.json_reviews import JSON_ENDINGS
from genrec_shards.readers.tabular import ENDINGS
from genrec_shards.readers.text_blocks import blocks

Format = Literal["auto", "sequences", "data", "interactions", "amazon", "yelp"]
LOG_FORMATS = ("interactions", "amazon", "yelp")


def guess_format(path: Path) -> Format:
    """By name and first line; what nothing speaks against is taken for `sequences`. Raises
    DataError as `blocks`."""
    if path.is_dir():
        if (path / "dataset.json").exists():
            return "data"
        files = sorted(
            file for file in path.iterdir() if _ending(file) in (*ENDINGS, *JSON_ENDINGS)
        )
        return (
            "interactions"
            if not files or _ending(files[0]) in ENDINGS
            else _of_json(_first_line(files[0]))
        )
    return guess_by_name(path.name, lambda: _first_line(path))


def guess_by_name(name: str, first_line: Callable[[], bytes]) -> Format:
    """The same of a file that lies anywhere; its first line is asked for only where the name does
    not tell."""
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    if ending in ENDINGS:
        return "interactions"
    return _of_json(first_line()) if ending in JSON_ENDINGS else "sequences"


def _first_line(path: Path) -> bytes:
    return next((block.data.lstrip().partition(b"\n")[0] for block in blocks(path)), b"")


def _of_json(first: bytes) -> Format:
    """Yelp's reviews name a business, Amazon's anything else; the reader tells what a line
    lacks."""
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return "amazon"
    return "yelp" if isinstance(record, dict) and "business_id" in record else "amazon"


def _ending(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]
