"""`make faults`: a thousand attacks on the program, drawn by a seed; what was held and what was
not."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
EVERY = 100
"""Attacks between two lines about how far the suite is."""


ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "POLARS_MAX_THREADS": "2",
    "RAYON_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",  # a name that nobody means is not looked for
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--only", default="", help="GROUP, GROUP.KIND or GROUP.KIND:NUMBER")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1200, help="begin none after so many,")
    parser.add_argument("--least", type=int, default=1, help="but for the first so many")
    given = parser.parse_args(arguments)
    from suite import attacks, attempts, not_held, table
    from world import make_world

    names = [name for name in attacks(given.attacks, given.seed) if name.startswith(given.only)]
    if ":" in given.only:
        names = [given.only]
    print(f"{len(names)} attacks, seed {given.seed}", flush=True)
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        world = make_world(Path(folder) / "world")
        left = given.seconds - (time.monotonic() - began)
        for result in attempts(names, world, given.seed, given.processes, left, given.least):
            results.append(result)
            if len(names) < 20 or result.reason:
                words = result.reason or "held"
                print(f"{result.name} ({result.seconds:.1f} s): {words[:3000]}", flush=True)
            if len(results) % EVERY == 0:
                seconds = time.monotonic() - began
                print(f"{len(results)} of {len(names)}, {seconds:.0f} s", flush=True)
    if found := not_held(results, given.seed):
        print(f"\nNot held:\n{found}")
    print(f"\n{table(results)}\nseed {given.seed}, {time.monotonic() - began:.0f} s")
    return 1 if any(result.reason for result in results) else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HELPERS)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= ENVIRONMENT
    sys.exit(main())
