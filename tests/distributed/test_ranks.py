"""What ranks tell each other, and how each hears of one that fails or is gone, on real gloo
ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from places import HELPERS
from two_ranks import start_each

from genrec_dist.distributed.collectives import Ranks

SCRIPT = HELPERS / "meeting_rank.py"


def test_a_process_alone_is_its_own_rank_0() -> None:
    ranks = Ranks()
    assert ranks.exchange([1, 2]) == [[1, 2]]
    assert ranks.all_gather_str("é") == ["é"]
    assert [t.tolist() for t in ranks.gather(torch.arange(2))] == [[0, 1]]
    assert ranks.run_on_all(lambda: 5) == 5
    with pytest.raises(OSError, match="full"):
        ranks.gather(torch.arange(2), OSError("full"))


def test_a_text_is_cut_at_2000_bytes() -> None:
    assert Ranks().all_gather_str("é" * 1500) == ["é" * 1000]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("who", "how", "code"),
    [(1, "kill", -signal.SIGKILL), pytest.param(0, "exit", 3, marks=pytest.mark.ranks)],
)
def test_ranks_meet_and_name_the_one_that_is_gone(
    tmp_path: Path, who: int, how: str, code: int
) -> None:
    done = start_each([SCRIPT, tmp_path, str(who), how], tmp_path / "logs", 3)
    assert [rank.returncode for rank in done] == [
        code if rank == who else 0 for rank in range(3)
    ], done
    for rank in {0, 1, 2} - {who}:
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answers["exchange"] == [[k, -(2**62) + k] for k in range(3)]
        assert answers["texts"] == [f"ränk {k}" for k in range(3)]
        assert answers["text of main"] == "said by 0"
        assert answers["gather"] == ([[[k, 1], [2, 3]] for k in range(3)] if rank == 0 else [])
        own = f"OSError: [Errno 27] file too large on {rank}"
        assert answers["all well"] == f"well: {rank}"
        theirs = "ValueError: rank {0}: [Errno 27] file too large on {0}"
        assert answers["one fails"] == (own if rank == 1 else theirs.format(1))
        assert answers["main fails"] == (own if rank == 0 else theirs.format(0))
        assert answers["two fail"] == (own if rank else theirs.format(1))
        assert answers["one has nothing"] == (
            "ValueError: no list" if rank == 2 else "ValueError: rank 2: no list"
        )
        assert answers["and on"] == [[0], [1], [2]]
        assert answers["one is gone"].startswith(f"RankGone: rank {who} has gone (")
        assert answers["one is gone"].endswith("): its own message says why, unless it was killed")
