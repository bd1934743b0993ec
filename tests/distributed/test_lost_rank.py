"""A rank that is killed while the others wait for its gradients, inside a collective of DDP's or
DeepSpeed's own: who says what, and how soon."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from genrec_shards.file_lock import LOCK_FILE, hold
from places import HELPERS
from run_events import events
from two_ranks import deepspeed_environment, environment, run_ranks, start_each

pytestmark = pytest.mark.dist


def lost(
    tiny_recipe: Path, who: int, stage: int | None, num_ranks: int
) -> tuple[list[list[str]], dict]:
    """Each rank's standard error, and the status that the survivors left."""
    folder = tiny_recipe.parent
    env = environment()
    if stage is not None:
        env = deepspeed_environment(
            ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage)
        )
    arguments = [HELPERS / "dying_rank.py", str(who), "3", folder / "died", tiny_recipe]
    done = start_each(arguments, folder / "logs", num_ranks, timeout=300, env=env)
    seconds = time.time() - float((folder / "died").read_text())
    for rank, process in enumerate(done):
        assert process.returncode == (-signal.SIGKILL if rank == who else 1), process
        assert "Traceback" not in process.stderr, process.stderr
    assert seconds < 10
    run = folder / "run"
    with hold(run / LOCK_FILE, "nobody"):
        status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 3)
    assert len(events(run, "start")) == 1
    return [process.stderr.rstrip().splitlines()[-1:] for process in done], status


@pytest.mark.parametrize(
    ("who", "stage"),
    [
        (0, None),
        pytest.param(1, 2, marks=pytest.mark.ranks),
        pytest.param(0, 3, marks=pytest.mark.ranks),
        pytest.param(1, 3, marks=pytest.mark.ranks),
    ],
)
def test_the_survivor_names_the_rank_in_one_line_and_leaves_a_status(
    tiny_recipe: Path, who: int, stage: int | None
) -> None:
    told, status = lost(tiny_recipe, who, stage, 2)
    (line,) = told[1 - who]
    assert line.startswith(f"genrec: rank {who} has gone (")
    assert line.endswith("): its own message says why, unless it was killed")
    assert status["reason"] == line.replace("genrec: ", "RankGone: ")
    ended = [event["status"] for event in events(tiny_recipe.parent / "run", "end")]
    assert ended == (["failed"] if who else [])  # rank 0 writes the log


@pytest.mark.ranks
def test_the_line_comes_though_the_launcher_signals_the_survivor(tiny_recipe: Path) -> None:
    folder = tiny_recipe.parent
    arguments = [HELPERS / "dying_rank.py", "1", "3", folder / "died", tiny_recipe]
    done = run_ranks(arguments, folder / "logs")
    assert done.stderr[0].rstrip().splitlines()[-1].startswith("genrec: rank 1 has gone (")
    assert "Traceback" not in done.stderr[0]
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 3)


@pytest.mark.ranks
def test_of_four_ranks_those_that_lost_a_connection_name_the_right_one(tiny_recipe: Path) -> None:
    """In a ring of four, ranks 0 and 2 are rank 3's neighbours; rank 1 waits for one that has left
    because of it."""
    told, status = lost(tiny_recipe, 3, None, 4)
    for rank in (0, 2):
        assert told[rank][0].startswith("genrec: rank 3 has gone (")
    assert told[1][0].startswith(("genrec: rank 0 has gone (", "genrec: rank 3 has gone ("))
    assert status["reason"].startswith("RankGone: rank 3 has gone (")


def test_a_rank_that_is_lost_while_a_group_is_made_is_named(tmp_path: Path) -> None:
    """The store says it by the kind of its error, and not in gloo's words."""
    left, told = start_each([HELPERS / "leaving_rank.py"], tmp_path, timeout=100, env=environment())
    assert left.returncode == -signal.SIGKILL
    assert (told.returncode, told.stderr.count("Traceback")) == (0, 0), told.stderr
    assert told.stdout.startswith("rank 0 has gone ("), told.stdout
