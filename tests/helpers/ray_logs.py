"""Logs written in every format, and the rows of what became of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.ray_engine.log_spans import Sizes

START = 1_400_000_000

SMALL = Sizes(block=512, span=4096, bucket=8192, most=9)


def rows_of(seed: int, num_rows: int = 1500) -> list[tuple[str, str, int]]:
    """A log with ties, duplicates, ids of every kind, users and items below any core; in no
    order."""
    draw = random.Random(seed)
    users = [f'U{n} "é,{n}' if n % 17 == 0 else f"U{n:04d}" for n in range(num_rows // 12)]
    items = [f"I{n:03d}" for n in range(90)] + ["x" * 300, "a b", "日本"]
    rows = [
        (
            users[int(len(users) * draw.random() ** 1.7)],
            items[int(len(items) * draw.random() ** 2)],
            START + draw.randrange(400) * 86_400,
        )
        for _ in range(num_rows)
    ]
    rows += draw.sample(rows, num_rows // 20)
    draw.shuffle(rows)
    return rows


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set('",\n') else text


def csv_of(rows, names="user,item,timestamp\n") -> bytes:
    return (names + "".join(f"{cell(u)},{cell(i)},{t}\n" for u, i, t in rows)).encode()


def json_of(rows, fields, spell=lambda time: time) -> bytes:
    return "".join(
        json.dumps(
            dict(zip(fields, (user, item, spell(time)), strict=True)) | {"text": 'fine, "really"'}
        )
        + "\n"
        for user, item, time in rows
    ).encode()


def parquet_of(rows, path: Path, group: int = 100) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(
        pa.table(dict(zip(("user", "item", "timestamp"), columns, strict=True))),
        path,
        row_group_size=group,
    )


def parts(rows, number):
    return [rows[n * len(rows) // number : (n + 1) * len(rows) // number] for n in range(number)]


def write_csv(rows, path):
    (path / "log.csv").write_bytes(csv_of(rows))
    return path / "log.csv", "interactions"


def write_folder(rows, path):
    """Plain, gzipped and Parquet, small and large, in one folder."""
    folder = path / "log"
    folder.mkdir()
    found = parts(rows, 5)
    (folder / "a.csv").write_bytes(csv_of(found[0]))
    (folder / "b.csv.gz").write_bytes(gzip.compress(csv_of(found[1])))
    parquet_of(found[2], folder / "c.parquet")
    (folder / "d.tsv").write_bytes(
        "".join(
            f"{t}\t{i}\t{cell(u)}\n" for u, i, t in [("user", "item", "timestamp"), *found[3]]
        ).encode()
    )
    (folder / "e.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(found[4]).replace(b"\n", b"\r\n"))
    return folder, "interactions"


def write_amazon(rows, path):
    folder = path / "reviews"
    folder.mkdir()
    found = parts(rows, 3)
    (folder / "a.json").write_bytes(json_of(found[0], ("reviewerID", "asin", "unixReviewTime")))
    (folder / "b.json.gz").write_bytes(
        gzip.compress(json_of(found[1], ("reviewerID", "asin", "unixReviewTime")))
    )
    lines = [
        repr({"reviewerID": u, "asin": i, "unixReviewTime": t, "helpful": [0, 1]})
        for u, i, t in found[2]
    ]
    (folder / "c.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, "amazon"


def write_yelp(rows, path):
    def spell(time):
        return str(np.datetime64(time, "s")).replace("T", " ")

    (path / "review.json").write_bytes(json_of(rows, ("user_id", "business_id", "date"), spell))
    return path / "review.json", "yelp"


WRITERS = {"csv": write_csv, "folder": write_folder, "amazon": write_amazon, "yelp": write_yelp}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
