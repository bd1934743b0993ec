"""What does `prepare --engine ray` bring and cost on one machine: rows/s on one and on two workers
beside the local engine.

`OMP_NUM_THREADS=1 python benchmarks/prepare_ray.py [--rows ROWS] [--repeats N] [--json FILE]`; each
measurement is a fresh process with a Ray of its own on loopback, the ways in turn. The start of Ray
is timed apart. Memory is the driver's: its high-water mark above that before the log is opened, and
the most of its own pages (RssAnon, asked every 20 ms), which leaves out files that are mapped, as
the sequences and Ray's store are."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prepare_scale import high_water, write_log

WAYS = {"local": 0, "ray, 1 worker": 1, "ray, 2 workers": 2}
STORE_BYTES = 512 << 20


def own_pages() -> int:
    """Bytes of this process that no file backs."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


class Watch(threading.Thread):
    """The most own pages while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, own_pages())


def measured(way: str, log: Path) -> dict[str, Any]:
    """One way, in this process."""
    from genrec_shards.prepare import prepare

    workers, start = WAYS[way], time.perf_counter()
    if workers:
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        import ray

        ray.init(
            address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=40,
            object_store_memory=STORE_BYTES, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        ray.get([ray.remote(_warm).remote() for _ in range(2 * workers)])
    import polars  # noqa: F401

    started, before, own = time.perf_counter() - start, high_water(), own_pages()
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory(dir=log.parent) as folder:
        start = time.perf_counter()
        made = prepare(log, Path(folder) / "data", engine="ray" if workers else "local")
        seconds = time.perf_counter() - start
    watch.done.set()
    return {
        "seconds": seconds, "start": started, "growth": high_water() - before, "own_growth": watch.most - own,
        "kept": made.info.interactions, "hash": made.info.sequences_hash,
    }  # fmt: skip


def _warm() -> None:
    """A worker imports what it needs before the clock runs, as on a cluster that is up."""
    import genrec_shards.ray_engine.clean_log  # noqa: F401
    import polars  # noqa: F401


def compare(rows: int, repeats: int) -> dict[str, Any]:
    """All measurements, the ways in turn."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, rows)
        size = log.stat().st_size
        for _ in range(repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, "--log", str(log)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{way}: {found[way][-1]}", file=sys.stderr, flush=True)
    hashes = {run["hash"] for runs in found.values() for run in runs}
    assert len(hashes) == 1, "the engines differ"
    return {"rows": rows, "log_bytes": size, "repeats": repeats, "measured": found}


def claims_of(found: dict[str, Any]) -> list[Any]:
    from genrec_dist.bench.measure import Claim, median

    rows = found["rows"]
    rate = {
        way: rows / median([run["seconds"] for run in runs])
        for way, runs in found["measured"].items()
    }
    claims = []
    for way, other, goal in (
        ("ray, 1 worker", "local", 1.0),
        ("ray, 2 workers", "local", 1.0),
        ("ray, 2 workers", "ray, 1 worker", 1.5),
    ):
        gain = rate[way] / rate[other]
        claims.append(
            Claim(
                f"rate, {way}",
                other,
                rate[way],
                rate[other],
                "rows/s",
                gain,
                f">= {goal}x",
                gain >= goal,
            )
        )
    for key, name in (("growth", "driver's peak"), ("own_growth", "driver's own pages")):
        held = {
            way: median([run[key] for run in runs]) / rows
            for way, runs in found["measured"].items()
        }
        for way in ("ray, 1 worker", "ray, 2 workers"):
            ratio = held["local"] / max(held[way], 1e-9)
            claims.append(
                Claim(f"{name}, {way}", "local engine", held[way], held["local"], "bytes a row", ratio, ">= 1x", ratio >= 1)
            )  # fmt: skip
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=WAYS)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.log)))
        return
    from genrec_dist.bench.measure import format_claims, table, write_table

    found = compare(arguments.rows, arguments.repeats)
    claims = claims_of(found)
    print(format_claims(claims))
    if arguments.json:
        write_table(table("prepare-ray", claims, sizes=[found]), arguments.json)


if __name__ == "__main__":
    main()
