"""One rank of test_ranks.py: meets the others in every way there is, then some are lost.
`meeting_rank.py FOLDER WHO HOW`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from genrec_dist.distributed.collectives import Ranks, join


def outcome_of(action: object) -> str:
    try:
        return f"well: {action()}"  # type: ignore[operator]
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path, who: int, how: str) -> None:
    join()
    ranks = Ranks()

    def fail_on(*failing: int) -> int:
        if ranks.rank in failing:
            raise OSError(27, f"file too large on {ranks.rank}")
        return ranks.rank

    answers = {
        "exchange": ranks.exchange([ranks.rank, -(2**62) + ranks.rank]),
        "texts": ranks.all_gather_str(f"ränk {ranks.rank}"),
        "text of main": ranks.broadcast_str(f"said by {ranks.rank}"),
        "gather": [
            t.tolist()
            for t in ranks.gather(torch.tensor([[ranks.rank, 1], [2, 3]], dtype=torch.int32))
        ],
        "all well": outcome_of(lambda: ranks.run_on_all(lambda: fail_on())),
        "one fails": outcome_of(lambda: ranks.run_on_all(lambda: fail_on(1))),
        "main fails": outcome_of(lambda: ranks.run_on_all(lambda: fail_on(0))),
        "two fail": outcome_of(lambda: ranks.run_on_all(lambda: fail_on(1, 2))),
        "one has nothing": outcome_of(
            lambda: ranks.gather(torch.zeros(3), ValueError("no list") if ranks.rank == 2 else None)
        ),
        "and on": ranks.exchange([ranks.rank]),
    }
    if ranks.rank == who and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == who:
        os._exit(3)
    answers["one is gone"] = outcome_of(ranks.barrier)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(answers))
    os._exit(0)  # the group cannot be left in good order any more


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
