"""How much memory and time does `prepare` take per row of a large log, and a plain pandas script?

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
from statistics import median
from typing import Any

import numpy as np

ROWS_PER_USER, MOST_ITEMS = 10, 100_000
FIXED, BYTES_PER_ROW = 320 << 20, 40
"""The bound: libraries and buffers, and so many bytes for each row of the log."""
WAYS = ("ours", "pandas")


def write_log(path: Path, rows: int) -> None:
    """CSV in random order: users of ten rows or so, items by popularity, ids as Amazon's."""
    import polars as pl

    dice = np.random.default_rng(0)
    users = dice.integers(0, max(rows // ROWS_PER_USER, 1), rows)
    items = (min(rows // 50, MOST_ITEMS) * dice.random(rows) ** 2).astype(np.int64)
    times = dice.integers(1_100_000_000, 1_400_000_000, rows)
    table = pl.DataFrame({"user": users, "item": items, "timestamp": times})

    def ids(letter: str, column: str, factor: int, digits: int) -> pl.Expr:
        # An odd factor modulo a power of ten spreads the numbers without making two equal.
        number = pl.col(column) * factor % 10**digits
        return pl.format(letter + "{}", number.cast(pl.String).str.zfill(digits))

    user, item = ids("A", "user", 600_000_001, 12), ids("B", "item", 7_000_003, 9)
    table.with_columns(user=user, item=item).write_csv(path)


def ours(log: Path, out: Path) -> int:
    """Prepare the log; returns the interactions that stay."""
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
    """Bytes; unlike ru_maxrss it starts anew with a program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(way: str, log: Path) -> dict[str, float]:
    """One way, in this process; its libraries are imported before the clock starts."""
    libraries = ("genrec_shards.prepare", "polars") if way == "ours" else ("pandas", "pyarrow")
    for library in libraries:
        importlib.import_module(library)
    before = high_water()
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        start, cpu = time.perf_counter(), time.process_time()
        kept = (ours if way == "ours" else plain_pandas)(log, Path(folder) / "data")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = {"peak": high_water(), "before": before}
    return {"seconds": seconds, "cpu_seconds": cpu, **memory, "kept": kept}


def compare(rows: int, repeats: int) -> dict[str, Any]:
    """All measurements of each way at one size."""
    ways = WAYS if importlib.util.find_spec("pandas") else WAYS[:1]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, rows)
        for _ in range(repeats):
            for way in ways:
                command = [sys.executable, __file__, "--measure", way, "--log", str(log)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout))
                print(f"{rows:,} rows, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
        size = log.stat().st_size
    skipped = {} if "pandas" in ways else {"pandas": "not installed, so not measured"}
    facts = {"rows": rows, "log_bytes": size, "repeats": repeats}
    return {**facts, "measured": found, "skipped": skipped}


def claims_of(found: dict[str, Any]) -> list[Any]:
    """Our bound, and ours beside pandas where that was measured."""
    from genrec_dist.bench.measure import make_claim

    rows, name = found["rows"], f"{found['rows']:.0e}".replace("e+0", "e")
    medians = {
        way: {
            "rate": rows / median(run["seconds"] for run in runs),
            "cpu rate": rows / median(run["cpu_seconds"] for run in runs),
            "peak": median(run["peak"] for run in runs) / rows,
            "growth": median(run["peak"] - run["before"] for run in runs) / rows,
        }
        for way, runs in found["measured"].items()
    }
    beyond = max(run["peak"] - FIXED for run in found["measured"]["ours"]) / rows
    bound, unit = BYTES_PER_ROW, "bytes per row"
    id = f"peak beyond {FIXED >> 20} MiB at {name} rows"
    claims = [make_claim(id, "its own bound", beyond, bound, unit, "<= 1x")]
    units = {"growth": unit, "peak": f"{unit}, libraries included"}
    units |= {"rate": "rows/s", "cpu rate": "rows/s"}
    for key, unit in units.items() if "pandas" in medians else ():
        mine, theirs = medians["ours"][key], medians["pandas"][key]
        claims.append(
            make_claim(f"{key} at {name} rows", "plain pandas", mine, theirs, unit, ">= 1x")
        )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["1000000:5"], metavar="ROWS:REPEATS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=WAYS)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.log)))
        return
    from genrec_dist.bench.measure import format_claims, table, write_table

    found = [compare(*map(int, size.split(":"))) for size in options.rows]
    claims = [claim for one in found for claim in claims_of(one)]
    print(format_claims(claims))
    if options.json:
        write_table(table("prepare-scale", claims, sizes=found), options.json)


if __name__ == "__main__":
    main()
