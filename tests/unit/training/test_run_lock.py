"""One run directory, one process: who trains in it, what the second one is told, and that a killed
one blocks nobody."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Started
from genrec_shards.atomic import _temporary_sibling
from genrec_shards.file_lock import LOCK_FILE, hold
from run_events import events
from two_ranks import environment, start_each

from genrec_dist.config.load import load_recipe
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.run import train

LONG = ["--set", "finetune.epochs=500", "--set", "checkpoint_every=4", "--set", "workers=1"]


@pytest.fixture
def begin(tiny_recipe: Path) -> Iterator[Callable[..., Started]]:
    """Starts `genrec train` of the tiny recipe; what is still there at the end is killed."""
    started: list[Started] = []

    def begin(*more: str) -> Started:
        out, err = (tiny_recipe.parent / f"{len(started)}.{name}" for name in ("out", "err"))
        arguments = ["-m", "genrec_dist.train", tiny_recipe, *more]
        started.append(Started(arguments, out, err, environment()))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def wait_for(run: Path, kind: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(found(run, kind)) < count:
        assert time.monotonic() < deadline, f"no {kind}"
        time.sleep(0.01)


def found(run: Path, kind: str) -> list[dict]:
    try:
        return events(run, kind)
    except ValueError:  # a line is being written
        return []


def told(process: Started) -> str:
    """The last line of one that was refused."""
    done = process.wait(60)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def refusal(run: Path, pid: int) -> str:
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    holder = rf"process {pid} on {re.escape(socket.gethostname())} since {since}"
    return (
        rf"{re.escape(str(run / LOCK_FILE))}: another process trains this run \({holder}\): "
        "wait for its end, or end it"
    )


@pytest.mark.dist
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.4])
def test_of_two_trainings_of_a_run_one_trains(
    tiny_recipe: Path, begin: Callable[..., Started], seconds: float
) -> None:
    run = tiny_recipe.parent / "run"
    first = begin("--set", "finetune.epochs=4")
    time.sleep(seconds)
    second = begin("--set", "finetune.epochs=4")
    codes = [process.wait(60).returncode for process in (first, second)]
    assert sorted(codes) == [0, 1], codes
    winner, loser = (first, second) if codes[0] == 0 else (second, first)
    assert re.fullmatch(f"genrec: {refusal(run, winner.pid)}", told(loser))
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["pid"]) == ("finished", winner.pid)
    steps = [event["step"] for event in events(run, "step")]
    assert steps == list(range(len(steps)))
    assert len(events(run, "start")) == 1
    assert not (run / LOCK_FILE).exists()


@pytest.mark.dist
def test_a_resume_beside_a_training_is_refused_and_after_its_kill_goes_on(
    tiny_recipe: Path, begin: Callable[..., Started]
) -> None:
    run = tiny_recipe.parent / "run"
    first = begin(*LONG)
    wait_for(run, "checkpoint", 1)
    for more in ([], ["--resume", "latest"]):
        assert re.fullmatch(f"genrec: {refusal(run, first.pid)}", told(begin(*LONG, *more)))
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["pid"]) == ("running", first.pid)
    assert first.poll() is None
    assert len(events(run, "start")) == 1
    # Its worker lives on for seconds; it does not hold the run.
    first.kill()
    second = begin(*LONG, "--resume", "latest")
    wait_for(run, "start", 2)
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait(60).returncode == 143
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"


@pytest.mark.dist
def test_rank_0_holds_the_lock_and_all_ranks_hear_who_does(tiny_recipe: Path) -> None:
    run, arguments = tiny_recipe.parent / "run", ["-m", "genrec_dist.train", tiny_recipe]
    with hold(run / LOCK_FILE, "I"):
        pid = (run / LOCK_FILE).read_text().split()[1]
        done = start_each(arguments, tiny_recipe.parent / "logs")
    for rank, process in enumerate(done):
        assert process.returncode == 1
        line = process.stderr.splitlines()[-1]
        assert re.fullmatch(f"genrec: {'rank 0: ' * rank}{refusal(run, int(pid))}", line)
    assert not run.exists()


def test_a_run_is_free_of_what_killed_writers_left_and_a_refused_start_leaves_nothing(
    tiny_recipe: Path,
) -> None:
    recipe = load_recipe(tiny_recipe)
    run = Path(recipe.run)
    for name in ("status.json", "recipe.yaml", "audit.json", "best", "checkpoints/step-00000004"):
        for ending in ("tmp", "old"):
            left = _temporary_sibling(run / name, ending)
            if "." in name:
                left.parent.mkdir(parents=True, exist_ok=True)
                left.write_text("torn")
            else:
                left.mkdir(parents=True)
    train(recipe)
    assert not list(run.rglob(".*"))
    assert [path.name for path in list_checkpoints(run)] == ["step-00000003", "step-00000006"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ValueError, match="a run is there already"):
        train(recipe)
    with hold(run / LOCK_FILE, "I"), pytest.raises(ValueError, match="another process trains"):
        train(recipe, resume="latest")
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert {**after, run: 0} == {**before, run: 0}
