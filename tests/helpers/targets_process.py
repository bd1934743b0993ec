"""A process of test_kept_targets.py that needs soft targets: `targets_process.py DATA LOG SECONDS`.
What it does is added to LOG, a line each; making them takes so many seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from genrec_shards.dataset import load_dataset

from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.text.kept_targets import kept_soft_targets


def main(data: Path, log: Path, seconds: float) -> None:
    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    def make() -> Teacher:
        note("making")
        time.sleep(seconds)
        return Teacher(np.arange(3), np.ones((4, 2), np.int32), np.ones((4, 2), np.float32))

    dataset = load_dataset(data)
    note("ready")
    found = kept_soft_targets(dataset, {"version": 0}, make)
    note(f"has {found.items_SK.sum()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
