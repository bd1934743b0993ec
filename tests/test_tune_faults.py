"""Sweeps under real kills: of a trial, of a rank, of the driver; on two nodes; and the finals with their one look at test."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweeps
from genrec_tuning.finish import SEEDS, entered, finish_sweep, jobs_of
from genrec_tuning.record import Folder, Recorder, Sweep, read_sweep, trial_id
from genrec_tuning.space import load_space
from genrec_tuning.sweep import job_of
from genrec_tuning.trial import run_job
from genrec_tuning.watch import Ending, Watch
from two_ranks import environment

pytestmark = pytest.mark.ranks

# An epoch takes some tenths of a second: long enough to be killed in.
SLOW = """
checkpoint_every: 10000
"""
SPACE = """
set: {finetune.epochs: %d, finetune.batch_size: 4, pretrain.epochs: 0, validation.users: 20}
trials: 2
scheduler: none
search: random
resources_per_trial: {cpu: %d, processes: %d}
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""


def epochs_run(run: Path) -> list[int]:
    """Epochs that were validated, over all attempts, in the order of time."""
    return [event["epoch"] + 1 for event in sweeps.events(run, "validation")]


def steps_rerun(run: Path) -> int:
    """Steps before the first checkpoint of a resume that were run again: none may be."""
    starts = [Path(event["resumed_from"]) for event in sweeps.events(run, "start") if event["resumed_from"]]
    firsts = [int(path.name.removeprefix("step-")) for path in starts]
    steps = [event["step"] for event in sweeps.events(run, "step")]
    return sum(steps.count(step) - 1 for step in range(min(firsts, default=0)))


@pytest.fixture(scope="module")
def killed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A sweep of two trials: one trial is killed, then the driver; then it is resumed with Ray's own files torn."""
    folder = tmp_path_factory.mktemp("killed")
    out = folder / "out"
    space = sweeps.write_space(folder, tiny_data, SPACE % (14, 1, 1), SLOW)
    seen: dict = {"out": out}
    process = sweeps.start(space, "--out", out)
    try:
        run = out / "runs" / "t0000"
        sweeps.wait_for(process, lambda: len(sweeps.events(run, "checkpoint")) >= 2, "two epochs of the first trial")
        sweeps.kill(sweeps.pid_of(run))
        seen["epochs at the kill"] = len(sweeps.events(run, "checkpoint"))
        sweeps.wait_for(process, lambda: len(sweeps.events(run, "start")) == 2, "the second attempt")
        seen["driver's pid"] = process.pid
        sweeps.wait_for(
            process, lambda: sweeps.record(out).trials[0].status == "finished" and len(sweeps.record(out).trials) == 2,
            "the first trial's end",
        )  # fmt: skip
        second = out / "runs" / "t0001"
        sweeps.wait_for(
            process, lambda: len(sweeps.events(second, "checkpoint")) >= 2, "two epochs of the second trial"
        )
        seen["trainer"] = sweeps.pid_of(second)
        sweeps.kill(process.pid)
        process.communicate()
        seen["before"] = read_sweep(out)
        seen["orphans gone"] = sweeps.gone(lambda: sweeps.processes("raylet/raylet", str(process.pid)))
        torn = list((out / "ray").rglob("tuner.pkl"))
        assert torn
        for path in torn:
            path.write_bytes(path.read_bytes()[:100])
        process = sweeps.start(space, "--out", out, "--resume")
        sweeps.wait_for(process, lambda: len(sweeps.events(second, "start")) >= 2, "the resumed trial")
        process.send_signal(signal.SIGTERM)
        _, seen["told"] = process.communicate(timeout=120)
        seen["code"] = process.returncode
        seen["stopped"] = read_sweep(out)
        seen["finished"] = sweeps.run(space, "--out", out, "--resume")
    finally:
        process.kill()
    seen["after"] = read_sweep(out)
    return seen


def test_a_killed_trial_is_retried_from_its_own_checkpoint(killed: dict) -> None:
    trial = killed["after"].trials[0]
    run = killed["out"] / trial.run
    assert trial.attempts == 2
    assert trial.status == "finished"
    assert [epoch.epoch for epoch in trial.epochs] == list(range(1, 15))
    assert len(sweeps.events(run, "start")) == 2
    assert sweeps.events(run, "start")[1]["resumed_from"] is not None
    done = killed["epochs at the kill"]
    assert epochs_run(run).count(1) == 1
    assert all(epochs_run(run).count(epoch) == 1 for epoch in range(1, done + 1))
    assert steps_rerun(run) == 0
    assert "its process died" in str(killed["before"].trials[0].reason) or killed["before"].trials[0].reason is None


def test_a_killed_driver_loses_nothing(killed: dict) -> None:
    before, after = killed["before"], killed["after"]
    assert killed["finished"].returncode == 0, killed["finished"].stderr
    assert after.trials[0] == before.trials[0]
    assert before.trials[1].status == "running"
    second = after.trials[1]
    assert (second.status, second.values) == ("finished", before.trials[1].values)
    assert second.epochs[: len(before.trials[1].epochs)] == before.trials[1].epochs
    run = killed["out"] / second.run
    assert steps_rerun(run) == 0
    assert sweeps.events(run, "start")[1]["resumed_from"] is not None
    assert len(sweeps.events(killed["out"] / "runs" / "t0000", "start")) == 2, "a finished trial ran again"
    assert after.resumed == 2
    assert after.hours > before.hours


def test_the_driver_takes_its_trials_with_it(killed: dict) -> None:
    assert killed["orphans gone"]
    assert sweeps.gone(lambda: Path(f"/proc/{killed['trainer']}/status").exists())


def test_a_signal_interrupts_and_says_how_to_go_on(killed: dict) -> None:
    assert killed["code"] == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in killed["told"]
    assert "--resume" in killed["told"]
    assert "Traceback" not in killed["told"]
    stopped = killed["stopped"].trials[1]
    assert (stopped.status, stopped.reason) == ("interrupted", "stopped by SIGTERM")


def test_a_budget_ends_a_sweep_in_good_order(tiny_data: Path, tmp_path: Path) -> None:
    space = sweeps.write_space(tmp_path, tiny_data, SPACE % (5000, 1, 1), SLOW)
    done = sweeps.run(space, "--out", tmp_path / "out", "--budget-hours", str(14 / 3600))
    assert done.returncode == 0, done.stderr
    sweep = read_sweep(tmp_path / "out")
    assert {trial.status for trial in sweep.trials} <= {"interrupted"}
    assert sweep.hours >= 14 / 3600
    if sweep.trials:
        assert "go on with --resume" in done.stdout
        assert "budget" in str(sweep.trials[0].reason)


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, dict[str, str]]]:
    """(address, environment of who connects) of a cluster that asks for a token."""
    more = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback
    }  # fmt: skip
    script = [sys.executable, str(Path(__file__).with_name("two_nodes.py"))]
    with subprocess.Popen(
        script, env=environment(**more), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        try:
            yield nodes.stdout.readline().strip(), more
        finally:
            nodes.stdin.close()
            nodes.wait(timeout=60)


def test_trials_of_two_ranks_run_on_two_nodes(
    two_nodes: tuple[str, dict[str, str]], tiny_data: Path, tmp_path: Path
) -> None:
    """A node has room for one trial, so two lie on two. One loses a rank, the other its own process; both go on where they were."""
    address, more = two_nodes
    space = sweeps.write_space(tmp_path, tiny_data, SPACE % (8, 2, 2), SLOW)
    out = tmp_path / "out"
    process = sweeps.start(space, "--out", out, "--address", address, **more)
    runs = [out / "runs" / trial_id(number) for number in range(2)]

    def ranks_of(run: Path) -> list[int]:
        return sweeps.processes("genrec_tuning.rank", str(run))

    try:
        sweeps.wait_for(
            process, lambda: all(sweeps.events(run, "checkpoint") for run in runs), "an epoch of both trials"
        )
        ranks = [ranks_of(run) for run in runs]
        assert [len(found) for found in ranks] == [2, 2]
        trials = [sweeps.parent_of(found[0]) for found in ranks]
        assert len({sweeps.parent_of(trial) for trial in trials}) == 2, "both trials are of one node's raylet"
        sweeps.kill(ranks[0][-1])
        sweeps.kill(trials[1])
        assert sweeps.gone(lambda: set(ranks[1]) & set(ranks_of(runs[1]))), "ranks outlived their trial"
        for run in runs:
            sweeps.wait_for(process, lambda run=run: len(sweeps.events(run, "start")) == 2, "the second attempt")  # type: ignore[misc]
        assert not set(ranks[0]) & set(ranks_of(runs[0])), "a rank outlived its group"
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    sweep = read_sweep(out)
    assert [(trial.status, trial.attempts) for trial in sweep.trials] == [("finished", 2), ("finished", 2)]
    for run in runs:
        starts = sweeps.events(run, "start")
        assert [start["processes"] for start in starts] == [2, 2]
        assert "MULTI_CPU" in starts[0]["distributed_type"]
        assert starts[1]["resumed_from"] is not None
        assert steps_rerun(run) == 0


FINALS = """
set: {finetune.epochs: 1, pretrain.epochs: 0}
trials: 2
search: random
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""


def test_the_finals_look_at_test_once(tiny_data: Path, tmp_path: Path) -> None:
    """Two trials and the base recipe with three seeds; all but one run have been made when the finals are gone on with."""
    out = tmp_path / "out"
    space = load_space(sweeps.write_space(tmp_path, tiny_data, FINALS))
    recorder = Recorder(Folder(out), Sweep(space.name, space.as_dict()))
    recorder.put_facts(started=1.0)
    watch = Watch({}, Ending(), recorder.put, lambda: None)
    for number, rate in enumerate((1e-3, 8e-3)):
        values = {"finetune.learning_rate": rate}
        run = f"runs/{trial_id(number)}"
        recipe = space.recipe_of(values, run).as_dict()
        job = job_of(trial_id(number), str(out), run, recipe, values, space.resources)  # type: ignore[arg-type]
        watch.started(job)
        run_job(job, lambda result, id_=job.id: watch.reported(id_, result))  # type: ignore[misc]
    assert not list(out.rglob("*test*"))
    recorder.put_finals(finals=entered(recorder.sweep, against_base=True))
    jobs = list(jobs_of(recorder.sweep, str(out)).values())
    assert len(jobs) == 9
    finals = list(recorder.sweep.finals)
    for number, job in enumerate(jobs[:-1]):
        scores: list[dict] = []
        run_job(job, scores.append)
        finals[number] = dataclasses.replace(finals[number], status="finished", NDCG10=scores[-1]["best_NDCG@10"])
        recorder.put_finals(finals=tuple(finals))
    sweep = finish_sweep(out, against_base=True)
    means = {
        system: sum(final.NDCG10 or 0 for final in sweep.finals if final.system == system) / len(SEEDS)
        for system in ("t0000", "t0001")
    }
    assert sweep.winner == max(means, key=lambda system: means[system])
    assert read_sweep(out) == sweep
    tested = {path.parent.parent.name for path in out.rglob("metrics-test.json")}
    assert tested == {sweep.winner, "base"}
    assert all((final.test is not None) == (final.system in tested) for final in sweep.finals)
    assert {final.seed for final in sweep.finals} == set(SEEDS)
    assert sweep.comparison is not None
    assert sweep.comparison["metrics"]["NDCG@10"].keys() >= {"a", "b", "difference", "ci95"}
    before = {path: path.read_bytes() for path in out.rglob("metrics-test.json")}
    with pytest.raises(ValueError, match=f"{sweep.winner} was evaluated on test already .* looks at test once"):
        finish_sweep(out, against_base=True)
    assert before == {path: path.read_bytes() for path in out.rglob("metrics-test.json")}
