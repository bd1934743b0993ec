"""Which format a log is in, where its name and first line tell."""

import json
from pathlib import Path
from typing import Literal

from genrec_shards.readers.blocks import blocks
from genrec_shards.readers.interactions import ENDINGS
from genrec_shards.readers.json_lines import JSON_ENDINGS

Format = Literal["auto", "sequences", "data", "interactions", "amazon", "yelp"]
LOG_FORMATS = ("interactions", "amazon", "yelp")


def guess_format(path: Path) -> Format:
    """By name and first line; what nothing speaks against is taken for `sequences`. Raises DataError as `blocks`."""
    if path.is_dir():
        if (path / "dataset.json").exists():
            return "data"
        files = sorted(file for file in path.iterdir() if _ending(file) in (*ENDINGS, *JSON_ENDINGS))
        return "interactions" if not files or _ending(files[0]) in ENDINGS else _of_json(files[0])
    if _ending(path) in ENDINGS:
        return "interactions"
    return _of_json(path) if _ending(path) in JSON_ENDINGS else "sequences"


def _of_json(path: Path) -> Format:
    """Yelp's reviews name a business, Amazon's anything else; the reader tells what a line lacks."""
    first = next((block.data.lstrip().partition(b"\n")[0] for block in blocks(path)), b"")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return "amazon"
    return "yelp" if isinstance(record, dict) and "business_id" in record else "amazon"


def _ending(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]
