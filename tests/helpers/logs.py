"""Logs in every format, and what became of them."""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.ray_engine.log_spans import Sizes
from genrec_shards.sequences import Sequences
from genrec_shards.timestamps import moment

Row = tuple[str, str, int]
"""User, item, time."""
START = 1_400_000_000
SMALL = Sizes(block=512, span=4096, bucket=8192, most=9)
"""Many tasks of a small log."""
NAMES = ("user", "item", "timestamp")
DATES = "2014-07-01,2014-10-01"
AMAZON = ("reviewerID", "asin", "unixReviewTime")


def messy_rows(seed: int, num_rows: int = 1500) -> list[Row]:
    """A log with ties, duplicates, ids of every kind, users and items below any core; in no
    order."""
    draw = random.Random(seed)
    users = [f'U{n} "é,{n}' if n % 17 == 0 else f"U{n:04d}" for n in range(num_rows // 12)]
    items = [f"I{n:03d}" for n in range(90)] + ["x" * 300, "a b", "日本"]
    rows = []
    for _ in range(num_rows):
        user, item = draw.random() ** 1.7, draw.random() ** 2
        time = START + draw.randrange(400) * 86_400
        rows.append((users[int(len(users) * user)], items[int(len(items) * item)], time))
    rows += draw.sample(rows, num_rows // 20)
    draw.shuffle(rows)
    return rows


def dated_rows(held_out_seed: int = 0, num_items: int = 12) -> list[Row]:
    """Rows over the year 2014, times in seconds; those from July on are drawn by a seed of their
    own. Users u36 to u39 and two items come in July; no user has two rows of one time."""
    rows: list[Row] = []
    start = moment("2014-01-01", "") // 1_000_000
    # Day 180 is the last of June.
    for seed, users, items, fewest, days in (
        ([0], 36, num_items, 4, (0, 181)),
        ([0, held_out_seed], 40, num_items + 2, 0, (181, 365)),
    ):
        dice = np.random.default_rng(seed)
        for user in range(users):
            for _ in range(dice.integers(fewest, 9)):
                day, item = int(dice.integers(*days)), int(dice.integers(items))
                rows.append((f"u{user:02}", f"i{item:02}", start + day * 86_400 + len(rows)))
    dice.shuffle(rows)
    return [(str(user), str(item), int(time)) for user, item, time in rows]


def csv_of(
    rows: Sequence[Sequence[object]], names: Sequence[str] = NAMES, sign: str = ","
) -> bytes:
    def cell(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set('",\n') else text

    return "".join(sign.join(map(cell, row)) + "\n" for row in [names, *rows]).encode()


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.write_bytes(csv_of(rows))
    return path


def json_of(
    rows: Sequence[Row],
    fields: Sequence[str],
    spell: Callable[[int], object] = lambda time: time,
    line: Callable[[dict], str] = json.dumps,
) -> bytes:
    more = {"text": 'fine, "really"', "helpful": [0, 1]}
    found = (dict(zip(fields, (u, i, spell(t)), strict=True)) | more for u, i, t in rows)
    return "".join(line(record) + "\n" for record in found).encode()


def parquet_of(rows: Sequence[Row], path: Path) -> None:
    columns = map(list, zip(*rows, strict=True))
    pq.write_table(pa.table(dict(zip(NAMES, columns, strict=True))), path, row_group_size=100)


def parts(rows: list[Row], number: int) -> list[list[Row]]:
    return [rows[n * len(rows) // number : (n + 1) * len(rows) // number] for n in range(number)]


def _csv(rows: list[Row], path: Path) -> tuple[Path, str]:
    return write_csv(path / "log.csv", rows), "interactions"


def _folder(rows: list[Row], path: Path) -> tuple[Path, str]:
    """Plain, gzipped and Parquet, small and large, in one folder."""
    (folder := path / "log").mkdir()
    found = parts(rows, 5)
    write_csv(folder / "a.csv", found[0])
    (folder / "b.csv.gz").write_bytes(gzip.compress(csv_of(found[1])))
    parquet_of(found[2], folder / "c.parquet")
    reversed_rows = [row[::-1] for row in found[3]]
    (folder / "d.tsv").write_bytes(csv_of(reversed_rows, NAMES[::-1], "\t"))
    (folder / "e.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(found[4]).replace(b"\n", b"\r\n"))
    return folder, "interactions"


def _amazon(rows: list[Row], path: Path) -> tuple[Path, str]:
    (folder := path / "reviews").mkdir()
    found = parts(rows, 3)
    (folder / "a.json").write_bytes(json_of(found[0], AMAZON))
    (folder / "b.json.gz").write_bytes(gzip.compress(json_of(found[1], AMAZON)))
    (folder / "c.json").write_bytes(json_of(found[2], AMAZON, line=repr))
    return folder, "amazon"


def _yelp(rows: list[Row], path: Path) -> tuple[Path, str]:
    fields = ("user_id", "business_id", "date")
    data = json_of(rows, fields, lambda time: str(np.datetime64(time, "s")).replace("T", " "))
    (path / "review.json").write_bytes(data)
    return path / "review.json", "yelp"


def _objects(rows: list[Row], path: Path) -> tuple[Path, str]:
    (path / "log.jsonl").write_bytes(json_of(rows, ("userId", "item_id", "ts")))
    return path / "log.jsonl", "interactions"


def _colons(rows: list[Row], path: Path) -> tuple[Path, str]:
    """As MovieLens-1M has them: no names, a rating before the time."""
    rated = [(user, item, 3, time) for user, item, time in rows]
    data = csv_of(rated, ("user", "item", "rating", "time"), "::")
    (path / "ratings.dat").write_bytes(data.partition(b"\n")[2])
    return path / "ratings.dat", "interactions"


def _zipped(rows: list[Row], path: Path) -> tuple[Path, str]:
    with zipfile.ZipFile(path / "log.zip", "w") as archive:
        archive.writestr("log.csv", csv_of(rows))
    return path / "log.zip", "interactions"


WRITERS = {
    **{"csv": _csv, "folder": _folder, "amazon": _amazon, "yelp": _yelp},
    **{"objects": _objects, "colons": _colons, "zipped": _zipped},
}
"""Each writes rows into a folder and gives the source and its format."""


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def by_user(sequences: Sequences, times: np.ndarray | None) -> dict[str, list[tuple[str, int]]]:
    """User -> (item, time) in the order of the sequences; time 0 where there are none."""
    times = np.zeros(sequences.num_interactions, np.int64) if times is None else times
    rows = [
        (sequences.item_ids[item], int(time))
        for item, time in zip(sequences.items, times, strict=True)
    ]
    bounds = sequences.offsets.tolist()
    ends = zip(sequences.user_ids, bounds[:-1], bounds[1:], strict=True)
    return {user: rows[start:end] for user, start, end in ends}
