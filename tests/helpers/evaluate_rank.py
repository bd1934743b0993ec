"""One rank of test_evaluate.py: evaluates a run in several ways. `evaluate_rank.py RUN DATA OUT`:
OUT/NAME/ for each way."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset

from genrec_dist.distributed.collectives import Ranks, join, leave
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import LoadedRun, load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.validation import history_loss, target_histogram

WAYS = {
    "five-batches": (Decoding(batch_size=25), 120),
    "fewer-batches-than-ranks": (Decoding(batch_size=64, top=30), 120),
    "windows-that-do-not-divide": (Decoding(batch_size=7, exclude_history=False), 50),
    "a-window-of-one-user": (Decoding(batch_size=16, mode="compact"), 17),
}
"""Name -> how, users a window. 120 users."""


def every_way(loaded: LoadedRun, dataset: Dataset, out: Path, ranks: Ranks) -> None:
    for name, (decoding, window) in WAYS.items():
        done: list[int] = []
        evaluate(
            replace(loaded, path=out / name),
            dataset,
            "test",
            decoding=decoding,
            ranks=ranks,
            on_batch=done.append,
            window=window,
        )
        assert sum(done) == dataset.sequences.num_users
    view, users = dataset.sequences.history_and_target("validation"), np.arange(3, 120)
    counts = target_histogram(
        loaded.searcher, loaded.layout, view, users, Decoding(batch_size=25), ranks
    )
    loss = history_loss(loaded.model, loaded.layout, view, users, ranks, batch_size=25)
    (out / f"validation-{ranks.rank}.json").write_text(
        json.dumps({"counts": counts.tolist(), "loss": loss.hex()})
    )


def main(run: str, data: str, out: Path) -> None:
    join()
    loaded, dataset, ranks = load_run(run), load_dataset(data), Ranks()
    every_way(loaded, dataset, out, ranks)
    try:  # as if each rank had been started with other options
        evaluate(
            replace(loaded, path=out / "unlike"),
            dataset,
            "test",
            decoding=Decoding(beam=20 + ranks.rank),
            ranks=ranks,
        )
    except ValueError as error:
        (out / f"unlike-{ranks.rank}.txt").write_text(str(error))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
