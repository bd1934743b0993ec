"""`launch/restarting.sh`: ranks that are lost or stuck are started again, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import BIN, LAUNCH, ROOT
from run_events import events
from two_ranks import environment, start_each

from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.watch import RankWatch, stuck_ranks
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints

SETS = ["checkpoint_every=2", "workers=1", "finetune.epochs=6", "finetune.batch_size=20"]


def write(run: Path, *ranks: tuple[int, str]) -> None:
    (run / "ranks").mkdir(exist_ok=True)
    for rank, (step, doing) in enumerate(ranks):
        facts = {"step": step, "doing": doing, "pid": 7 + rank, "host": "n1"}
        facts |= {"since": 0.0 if doing == "between steps" else 40.0, "time": 100.0}
        (run / "ranks" / f"rank-{rank:05d}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (
            [(8, "waiting for the other ranks"), (7, "computing"), (8, "waiting for a batch")],
            "rank 1 is stuck computing at step 7 (process 8 on n1); 2 further on",
        ),
        (
            [(8, "waiting for the other ranks"), (8, "waiting for a batch")],
            "rank 1 is stuck waiting for a batch at step 8 (process 8 on n1); 1 further on",
        ),
        (
            [(8, "computing"), (8, "computing")],
            "rank 0 is stuck computing at step 8 (process 7 on n1); rank 1 is stuck computing at "
            "step 8 (process 8 on n1); no rank is further on",
        ),
        (
            [(8, "waiting for the other ranks to validate"), (8, "validating")],
            "rank 1 is stuck validating at step 8 (process 8 on n1); 1 further on",
        ),
    ],
)
def test_the_rank_that_is_furthest_back_is_named(
    tmp_path: Path, ranks: list[tuple[int, str]], line: str
) -> None:
    write(tmp_path, *ranks)
    assert stuck_ranks(tmp_path, len(ranks), 50.0) == line
    more = f"rank {len(ranks)} has not begun its first step"
    assert stuck_ranks(tmp_path, len(ranks) + 1, 50.0) == more


def test_nobody_is_stuck_while_one_does_what_may_take_long(tmp_path: Path) -> None:
    # The first began a batch at 40: behind, but at work, unless that is too long ago.
    write(tmp_path, (8, "validating"), (8, "waiting for the other ranks to validate"))
    assert stuck_ranks(tmp_path, 2, late=30.0) == ""
    assert stuck_ranks(tmp_path, 2, late=50.0).startswith("rank 0 is stuck validating")
    write(tmp_path, (7, "between steps"), (8, "waiting for the other ranks"))
    assert stuck_ranks(tmp_path, 2, late=50.0) == ""
    # Halted, it does nothing at all.
    line = "rank 0 is stuck between steps at step 7 (process 7 on n1); 1 further on"
    assert stuck_ranks(tmp_path, 2, late=101.0) == line


def test_the_flight_recorders_dump_is_mentioned_where_it_is_on(tmp_path: Path) -> None:
    def dump(**environ: str) -> str:
        return RankWatch(tmp_path, 3, 4, print, environ)._dump()

    assert dump() == dump(TORCH_FR_BUFFER_SIZE="0") == ""
    assert "its dump is /tmp/nccl_trace_rank_3 " in dump(TORCH_NCCL_TRACE_BUFFER_SIZE="20")
    place = {"TORCH_FR_DUMP_TEMP_FILE": "/scratch/rank_"}
    assert "its dump is /scratch/rank_3 " in dump(TORCH_FR_BUFFER_SIZE="2000", **place)


def signal_rank(run: Path, rank: int, number: int, after: int, job: subprocess.Popen[str]) -> int:
    """Send a rank a signal once this step is logged; returns its process."""
    log, deadline = run / "events.jsonl", time.monotonic() + 300
    while f'"step": {after},' not in (log.read_text() if log.exists() else ""):
        assert job.poll() is None, "it ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid: int = json.loads((run / "ranks" / f"rank-{rank:05d}.json").read_text())["pid"]
    os.kill(pid, number)
    return pid


@pytest.mark.ranks
@pytest.mark.dist
def test_a_killed_and_a_stuck_rank_are_started_again_and_the_run_takes_the_same_steps(
    tiny_recipe: Path,
) -> None:
    """Rank 1 is killed, the ranks are started again; then it is halted, the others name it, and all
    start again once more."""
    folder = tiny_recipe.parent
    sets = [word for change in SETS for word in ("--set", change)]
    unbroken, broken = folder / "unbroken", folder / "broken"
    alone = ["-m", "genrec_dist.train", tiny_recipe, "--set", f"run={unbroken}", *sets]
    done = start_each(alone, folder / "logs", timeout=300)
    assert not any(rank.returncode for rank in done), done
    last = events(unbroken, "step")[-1]["step"]

    settings = {"CPU_RANKS": "2", "GENREC_STUCK_SECONDS": "10", "MAX_RESTARTS": "2"}
    env = environment(**settings, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    env["PATH"] += f":{BIN}"
    output = (folder / "output").open("w+")
    job = subprocess.Popen(
        [LAUNCH / "restarting.sh", tiny_recipe, broken, *sets],
        env=env, cwd=ROOT, stdout=output, stderr=output, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        signal_rank(broken, 1, signal.SIGKILL, last // 3, job)
        halted = signal_rank(broken, 1, signal.SIGSTOP, 2 * last // 3, job)
        assert job.wait(timeout=300) == 0, (folder / "output").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)
        job.wait(timeout=60)
        output.close()
    said = (folder / "output").read_text()
    assert "genrec: rank 1 has gone (" in said
    assert "genrec: no step for 10 s: rank 1 is stuck " in said
    assert f"(process {halted} on " in said
    resumed = [event["resumed_from"] for event in events(broken, "start")]
    assert len(resumed) == 3
    assert resumed[0] is None
    assert all(resumed[1:])
    for step, expected in enumerate(events(unbroken, "step")):
        taken = [event for event in events(broken, "step") if event["step"] == step]
        assert {event["samples_digest"] for event in taken} == {expected["samples_digest"]}
        assert {event["loss"] for event in taken} == {expected["loss"]}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        one, two = (
            Checkpoint(list_checkpoints(run)[-1], {}, Ranks()).weights(kind)
            for run in (unbroken, broken)
        )
        assert all(torch.equal(one[name], two[name]) for name in one), kind
    assert json.loads((broken / "status.json").read_text())["status"] == "finished"
