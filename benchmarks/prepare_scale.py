"""How much memory and time does `prepare` take of a large log, a row, and what does a plain pandas
script take?

`OMP_NUM_THREADS=1 python benchmarks/prepare_scale.py [--rows ROWS:REPEATS ...] [--json FILE]`; each
measurement is a fresh process, ours and the peer's in turn. Memory is the process's own high-water
mark (VmHWM), the interpreter and all libraries included; `growth` is what is above the mark before
the log is opened."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS_A_USER, MOST_ITEMS = 10, 100_000
FIXED, BYTES_A_ROW = 320 << 20, 40
"""The bound: libraries and buffers, and B bytes for each row of the log."""
WAYS = ("ours", "pandas")


def write_log(path: Path, rows: int) -> None:
    """CSV in an order without order: users of about ten rows, items by popularity, ids as long as
    Amazon's."""
    import polars as pl

    draw = np.random.default_rng(0)
    users = draw.integers(0, max(rows // ROWS_A_USER, 1), rows)
    items = (min(rows // 50, MOST_ITEMS) * draw.random(rows) ** 2).astype(np.int64)
    table = pl.DataFrame(
        {
            "user": users,
            "item": items,
            "timestamp": draw.integers(1_100_000_000, 1_400_000_000, rows),
        }
    )
    # An odd factor modulo 10^12 spreads the numbers without making two equal.
    table = table.with_columns(
        user=pl.format(
            "A{}", (pl.col("user") * 600_000_001 % 10**12).cast(pl.String).str.zfill(12)
        ),
        item=pl.format("B{}", (pl.col("item") * 7_000_003 % 10**9).cast(pl.String).str.zfill(9)),
    )
    table.write_csv(path)


def ours(log: Path, out: Path) -> int:
    """Interactions that stay."""
    from genrec_shards.prepare import prepare

    return prepare(log, out).info.interactions


def plain_pandas(log: Path, out: Path) -> int:
    """What one writes first: all of it in memory, the same cleaning, lists of rows in Parquet."""
    import pandas as pd

    table = pd.read_csv(log).drop_duplicates()
    while True:
        kept = table[table.groupby("user")["item"].transform("size") >= 5]
        kept = kept[kept.groupby("item")["user"].transform("size") >= 5]
        if len(kept) == len(table):
            break
        table = kept
    table = table.sort_values(["user", "timestamp"], kind="stable")
    table["row"] = table["item"].astype("category").cat.codes
    out.mkdir()
    lists = table.groupby("user", sort=True)["row"].agg(list)
    lists.reset_index().to_parquet(out / "sequences.parquet", compression="zstd")
    return len(table)


def high_water() -> int:
    """Bytes; unlike ru_maxrss it begins anew with a program."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measured(way: str, log: Path) -> dict[str, float]:
    """One way, in this process."""
    if way == "ours":
        import genrec_shards.prepare  # noqa: F401
        import polars  # noqa: F401
    else:
        import pandas  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    before = high_water()
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        start, cpu = time.perf_counter(), time.process_time()
        kept = (ours if way == "ours" else plain_pandas)(log, Path(folder) / "data")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak": high_water(),
        "before": before,
        "kept": kept,
    }


def in_a_process(way: str, log: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, "--log", str(log)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(rows: int, repeats: int) -> dict[str, Any]:
    """Medians and all measurements of each way at one size."""
    ways = WAYS if importlib.util.find_spec("pandas") else WAYS[:1]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, rows)
        size = log.stat().st_size
        for _ in range(repeats):
            for way in ways:
                found[way].append(in_a_process(way, log))
                print(f"{rows:,} rows, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    skipped = {} if "pandas" in ways else {"pandas": "not installed, so not measured"}
    return {
        "rows": rows,
        "log_bytes": size,
        "repeats": repeats,
        "measured": found,
        "skipped": skipped,
    }


def claims_of(found: dict[str, Any]) -> list[Any]:
    from genrec_dist.bench.measure import Claim, median

    rows, names = found["rows"], f"{found['rows']:.0e}".replace("e+0", "e")
    middle = {
        way: {
            "rate": rows / median([run["seconds"] for run in runs]),
            "cpu rate": rows / median([run["cpu_seconds"] for run in runs]),
            "peak": median([run["peak"] for run in runs]) / rows,
            "growth": median([run["peak"] - run["before"] for run in runs]) / rows,
        }
        for way, runs in found["measured"].items()
    }
    mine = middle["ours"]
    beyond = max(run["peak"] - FIXED for run in found["measured"]["ours"]) / rows
    claims = [
        Claim(
            f"peak beyond {FIXED >> 20} MiB at {names} rows", "its own bound", beyond, BYTES_A_ROW, "bytes a row",
            beyond / BYTES_A_ROW, f"<= {BYTES_A_ROW}", beyond <= BYTES_A_ROW,
        )
    ]  # fmt: skip
    if "pandas" in middle:
        peer = middle["pandas"]
        for key, unit, ratio in (
            ("growth", "bytes a row", peer["growth"] / mine["growth"]),
            ("peak", "bytes a row, libraries included", peer["peak"] / mine["peak"]),
            ("rate", "rows/s", mine["rate"] / peer["rate"]),
            ("cpu rate", "rows a CPU second", mine["cpu rate"] / peer["cpu rate"]),
        ):
            claims.append(
                Claim(
                    f"{key} at {names} rows",
                    "plain pandas",
                    mine[key],
                    peer[key],
                    unit,
                    ratio,
                    ">= 1x",
                    ratio >= 1,
                )
            )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["1000000:5"], metavar="ROWS:REPEATS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=WAYS)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.log)))
        return
    from genrec_dist.bench.measure import format_claims, table, write_table

    found = [compare(*map(int, size.split(":"))) for size in arguments.rows]
    claims = [claim for one in found for claim in claims_of(one)]
    print(format_claims(claims))
    if arguments.json:
        write_table(table("prepare-scale", claims, sizes=found), arguments.json)


if __name__ == "__main__":
    main()
