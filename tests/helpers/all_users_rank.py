"""One rank of test_export_lists.py, or the only one: lists all users in several ways, by
`all_users_rank.py RUN DATA OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from genrec_shards.dataset import load_dataset

from genrec_dist.cli.app import run_command
from genrec_dist.distributed.collectives import Ranks, join
from genrec_dist.inference.export_lists import recommend_all
from genrec_dist.inference.load import load_run
from genrec_dist.inference.recommend import Recommender

WAYS = {
    "five-batches": (25, 120, 20),
    "windows-that-do-not-divide": (7, 50, 30),
    "one-batch": (256, 120, 5),
}
"""Name -> batch size, users a window, length of the lists. 120 users."""


def main(run: str, data: str, out: Path) -> int:
    """Exit code of the command, which also leaves the group."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join()
    ranks, recommender, dataset = Ranks(), Recommender(load_run(run)), load_dataset(data)
    for name, (batch_size, window, top) in WAYS.items():
        path = recommend_all(
            recommender,
            dataset,
            out / name,
            top=top,
            batch_size=batch_size,
            window=window,
            ranks=ranks,
        )
        assert (path is not None) == ranks.is_main
    return run_command(["recommend", run, "--all-users", "--out", str(out / "command")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
