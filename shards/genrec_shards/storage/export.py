"""The split of a data directory as files that other projects train on and score with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.dataset import Dataset
from genrec_shards.histories import windows
from genrec_shards.readers.frames import polars
from genrec_shards.sequences import flat_ranges
from genrec_shards.splits import NO_TARGET

if TYPE_CHECKING:
    import polars as pl

Form = Literal["csv", "recbole", "rectools"]
MARKER = "export.json"
_IDS = ("user_id", "item_id")
_BEFORE_2000 = 946_684_799_000_000
"""Microseconds since 1970 of the last second before 2000."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one file holds of each user's sequence."""

    name: str
    starts: np.ndarray
    """int64[U], places in the sequences' flat arrays."""
    ends: np.ndarray
    """int64[U], exclusive."""


def split_parts(dataset: Dataset) -> list[Part]:
    """The parts that `Sequences.history_and_target` tells apart: the training part, what comes
    between it and the test target, and the test target. The first item of a user's validation
    part is her validation target; leave-one-out has no other, a split by time may have. Items
    behind the test target are in no part."""
    sequences = dataset.sequences
    starts, validation = sequences.offsets[:-1], sequences.training_ends("n-2")
    test = sequences.history_and_target("test")
    return [
        Part("train", starts, validation),
        Part("validation", validation, test.ends),
        Part("test", test.ends, test.ends + (test.targets != NO_TARGET)),
    ]


def export(
    dataset: Dataset, out_dir: str | Path, form: Form, *, overwrite: bool = False
) -> dict[str, int]:
    """Write the split into a new directory, oldest item of a user first.

    - csv: `train.csv`, `validation.csv`, `test.csv` of `user_id`, `item_id`, `position` (from 1 in
      the whole sequence) and, where the log had times, `timestamp` (seconds since 1970).
    - rectools: the same files of `user_id`, `item_id`, `weight` (1) and `datetime`; without times
      the n-th item of a user has the n-th second of 2000.
    - recbole: `NAME.train.inter`, `NAME.valid.inter`, `NAME.test.inter` of `user_id:token`,
      `item_id:token`, `timestamp:float` (without times the position) and `position:float`; of
      leave-one-out also `NAME.inter`, all of them. NAME is that of the directory.

    `export.json` has the split, the hash of the sequences and the rows of each file.

    Args:
        dataset: The prepared data.
        out_dir: The directory.
        form: Whose files.
        overwrite: Replace an export that is there.

    Returns:
        Rows of each file, by its name.

    Raises:
        ValueError: The directory exists and may not be replaced.
    """
    out, info = Path(out_dir), dataset.info
    parts = split_parts(dataset)
    ending, separator = ("inter", "\t") if form == "recbole" else ("csv", ",")
    prefix = f"{out.resolve().name}." if form == "recbole" else ""
    short = {"validation": "valid"} if form == "recbole" else {}
    files = {f"{prefix}{short.get(part.name, part.name)}.{ending}": part for part in parts}
    if form == "recbole" and dataset.sequences.periods is None:
        # Its sequential models cut this file themselves, to the same split.
        files[f"{prefix}inter"] = Part("all", parts[0].starts, parts[-1].ends)
    rows = {name: int((part.ends - part.starts).sum()) for name, part in files.items()}
    with atomic_directory(out, overwrite=overwrite, marker=MARKER) as folder:
        for name, part in files.items():
            with (folder / name).open("wb") as file:
                for number, frame in enumerate(_frames(dataset, part, form)):
                    frame.write_csv(file, separator=separator, include_header=number == 0)
        told = {"to": form, "split": info.split_name, "sequences_hash": info.sequences_hash}
        text = json.dumps({**told, "rows": rows}, indent=1) + "\n"
        (folder / MARKER).write_text(text, encoding="utf-8")
    return rows


def _frames(dataset: Dataset, part: Part, form: Form) -> Iterator[pl.DataFrame]:
    """The rows of a part, one window of users after the other."""
    pl = polars()
    sequences = dataset.sequences
    users = pl.Series(sequences.user_ids, dtype=pl.String)
    items = pl.Series(sequences.item_ids, dtype=pl.String)
    for rows in windows(range(sequences.num_users)):
        lengths = part.ends[rows] - part.starts[rows]
        places = flat_ranges(part.starts[rows], lengths)
        owners = np.repeat(rows, lengths)
        positions = places - sequences.offsets[owners] + 1
        user, item = ("user_id:token", "item_id:token") if form == "recbole" else _IDS
        columns = {user: users[owners], item: items[sequences.items[places]]}
        times = None if dataset.timestamps is None else dataset.timestamps[places]
        if form == "csv":
            columns["position"] = pl.Series(positions)
            if times is not None:
                columns["timestamp"] = pl.Series(times / 1e6)
        elif form == "recbole":
            columns["timestamp:float"] = pl.Series(positions if times is None else times / 1e6)
            columns["position:float"] = pl.Series(positions)
        else:
            if times is None:
                times = _BEFORE_2000 + positions * 1_000_000
            columns["weight"] = pl.Series(np.ones(len(places), np.int64))
            columns["datetime"] = pl.Series(times).cast(pl.Datetime("us"))
        yield pl.DataFrame(columns)
