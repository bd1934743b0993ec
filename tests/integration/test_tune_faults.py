"""Sweeps under real kills: of a trial, of a rank, of the driver; on two nodes; and the finals with
their one look at test."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import sweeps
from genrec_tuning.finals import SEEDS, enter, finish_sweep, jobs_of
from genrec_tuning.record import Epoch, Folder, Recorder, Sweep, Trial, read_sweep, trial_id
from genrec_tuning.space import load_space
from genrec_tuning.sweep import job_of
from genrec_tuning.trial import Job, run_job
from places import HELPERS
from run_events import events
from s3_server import credentials, s3_server
from two_ranks import environment

pytestmark = pytest.mark.ranks

# An epoch takes some tenths of a second: long enough to be killed in.
SLOW = "checkpoint_every: 10000\n"
SPACE = """
set: {finetune.epochs: %d, finetune.batch_size: 4, pretrain.epochs: 0, validation.users: 20}
trials: 2
scheduler: none
search: random
resources_per_trial: {cpu: %d, processes: %d}
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""


EPOCHS = 12
"""Of a trial that is killed after two, resumed, stopped and resumed again: enough to have some left."""
CORES = len(os.sched_getaffinity(0))
"""What a trial requests where one is to run after the other."""


def steps_rerun(run: Path) -> int:
    """Steps before the first checkpoint of a resume that were run again: none may be."""
    starts = [event["resumed_from"] for event in events(run, "start")]
    firsts = [int(Path(path).name.removeprefix("step-")) for path in starts if path]
    steps = [event["step"] for event in events(run, "step")]
    return sum(steps.count(step) - 1 for step in range(min(firsts, default=0)))


@pytest.fixture(scope="module")
def killed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A sweep of two trials, one after the other: the first is killed; when one is over and the
    other runs, the driver is; it is resumed with Ray's own files torn, stopped by SIGTERM, resumed
    for a second, and resumed to its end."""
    folder = tmp_path_factory.mktemp("killed")
    out = folder / "out"
    space = sweeps.write_space(folder, tiny_data, SPACE % (EPOCHS, CORES, 1), SLOW)
    seen: dict = {"out": out}

    def saved(run: Path) -> int:
        return len(events(run, "checkpoint"))

    def finished() -> Trial | None:
        sweep = sweeps.record(out)
        trials = sweep.trials if sweep else ()
        return next((trial for trial in trials if trial.status == "finished"), None)

    process = sweeps.start(space, "--out", out)
    try:
        first = out / "runs" / "t0000"
        sweeps.wait_for(process, lambda: saved(first) >= 2, "two epochs of the first trial")
        seen["torch"] = [sweeps.has_torch(pid) for pid in (process.pid, sweeps.pid_of(first))]
        sweeps.kill(sweeps.pid_of(first))
        seen["epochs at the kill"] = saved(first)
        # Ray may let the second one go first, now that there is room.
        over = sweeps.wait_for(process, finished, "the end of a trial").id
        seen["over"], seen["left"] = over, "t0001" if over == "t0000" else "t0000"
        left = out / "runs" / seen["left"]
        before = saved(left)
        sweeps.wait_for(process, lambda: saved(left) >= before + 2, "two epochs of the other trial")
        seen["trainer"] = sweeps.pid_of(left)
        sweeps.kill(process.pid)
        process.communicate()
        seen["before"] = read_sweep(out)
        orphans = ("raylet/raylet", str(process.pid))
        seen["orphans gone"] = sweeps.gone(lambda: sweeps.processes(*orphans))
        torn = list((out / "ray").rglob("tuner.pkl"))
        assert torn
        for path in torn:
            path.write_bytes(path.read_bytes()[:100])
        starts = len(events(left, "start"))
        process = sweeps.start(space, "--out", out, "--resume")
        begun = lambda: len(events(left, "start")) > starts  # noqa: E731
        sweeps.wait_for(process, begun, "the resumed trial")
        process.send_signal(signal.SIGTERM)
        _, seen["stderr"] = process.communicate(timeout=120)
        seen["code"] = process.returncode
        seen["stopped"] = read_sweep(out)
        seen["spent"] = sweeps.run(space, "--out", out, "--resume", "--budget-hours", str(1 / 3600))
        seen["budget"] = read_sweep(out)
        seen["finished"] = sweeps.run(space, "--out", out, "--resume")
    finally:
        process.kill()
    seen["after"] = read_sweep(out)
    return seen


def test_a_killed_trial_is_retried_from_its_own_checkpoint(killed: dict) -> None:
    trial = killed["after"].trials[0]
    run, at_kill = killed["out"] / trial.run, killed["epochs at the kill"]
    assert trial.status == "finished"
    assert [epoch.epoch for epoch in trial.epochs] == list(range(1, EPOCHS + 1))
    starts = events(run, "start")
    assert trial.attempts == len(starts) >= 2
    step = trial.epochs[at_kill - 1].step + 1
    assert Path(starts[1]["resumed_from"]).name == f"step-{step:08d}"
    validated = [event["epoch"] + 1 for event in events(run, "validation")]
    assert all(validated.count(epoch) == 1 for epoch in range(1, at_kill + 1))
    assert steps_rerun(run) == 0


def test_the_driver_does_without_torch(killed: dict) -> None:
    assert killed["torch"] == [False, True]


def test_a_killed_driver_loses_nothing_and_takes_its_trials_with_it(killed: dict) -> None:
    before, after = killed["before"], killed["after"]
    assert killed["finished"].returncode == 0, killed["finished"].stderr
    over, left = killed["over"], killed["left"]
    assert after.trial(over) == before.trial(over)
    old, new = before.trial(left), after.trial(left)
    assert (old.status, new.status, new.values) == ("running", "finished", old.values)
    assert old.epochs
    assert new.epochs[: len(old.epochs)] == old.epochs
    run = killed["out"] / new.run
    assert events(run, "start")[old.attempts]["resumed_from"] is not None
    assert steps_rerun(run) == 0
    again = len(events(killed["out"] / "runs" / over, "start"))
    assert again == before.trial(over).attempts, "it ran again"
    assert after.resumed == 3
    assert after.hours > before.hours
    assert killed["orphans gone"]
    assert sweeps.gone(lambda: Path(f"/proc/{killed['trainer']}/status").exists())


def test_a_signal_or_a_budget_interrupts_and_says_how_to_go_on(killed: dict) -> None:
    assert killed["code"] == 128 + signal.SIGTERM
    for words in ("stopped by SIGTERM", "--resume"):
        assert words in killed["stderr"]
    assert "Traceback" not in killed["stderr"]
    stopped = killed["stopped"].trial(killed["left"])
    assert (stopped.status, stopped.reason) == ("interrupted", "stopped by SIGTERM")
    spent = killed["spent"]
    assert spent.returncode == 0, spent.stderr
    for words in ("1 trials were interrupted", "go on with --resume"):
        assert words in spent.stdout
    assert killed["budget"].trial(killed["left"]).status == "interrupted"
    assert 0 < killed["budget"].hours - killed["stopped"].hours < 120 / 3600


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    """The environment, which this process has too, of who reaches an S3 server on this machine that
    holds the bucket `sweeps`."""
    import boto3

    with s3_server() as (_, url), pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(url).items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="sweeps")
        yield credentials(url)


@pytest.fixture
def two_nodes(bucket: dict[str, str], tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(address, environment of who connects) of a cluster that asks for a token."""
    (tmp_path / "nodes").mkdir()
    more = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback
        "TMPDIR": str(tmp_path / "nodes"), "RAY_TMPDIR": "/tmp", **bucket,  # the names of its sockets may not be long
    }  # fmt: skip
    script = [sys.executable, str(HELPERS / "two_nodes.py"), "2"]
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


def test_trials_of_two_ranks_run_on_two_nodes_and_lie_in_a_bucket(
    two_nodes: tuple[str, dict[str, str]], tiny_data: Path, tmp_path: Path
) -> None:
    """A node has room for one trial, so two lie on two. One loses a rank; the other its process and
    its node's disk, and goes on from what is in the bucket."""
    address, more = two_nodes
    space = sweeps.write_space(tmp_path, tiny_data, SPACE % (8, 2, 2), SLOW)
    options = ["--out", tmp_path / "two", "--address", address, "--storage", "s3://sweeps/of"]
    process = sweeps.start(space, *options, **more)

    def run_of(number: int) -> Path:
        found = list((tmp_path / "nodes").glob(f"genrec-tune-*/*/runs/{trial_id(number)}"))
        return found[0] if found else tmp_path / "none"

    def ranks_of(number: int) -> list[int]:
        return sweeps.processes("genrec_tuning.rank_process", str(run_of(number)))

    def whole(number: int) -> list[str]:
        """A run's events in the bucket, which are sent behind the checkpoint they speak of."""
        files = Folder("s3://sweeps").files
        files.invalidate_cache()
        return files.glob(f"sweeps/of/two/runs/{trial_id(number)}/events.jsonl")

    def twice(number: int) -> bool:
        return len(events(run_of(number), "start")) == 2

    ranks, trials, raylets = {}, {}, set()
    try:
        for number in range(2):
            sweeps.wait_for(process, partial(whole, number), "a checkpoint in the bucket")
            ranks[number] = ranks_of(number)
            assert len(ranks[number]) == 2
            trials[number] = sweeps.parent_of(ranks[number][0])
            raylets.add(sweeps.parent_of(trials[number]))
            # Who only watches ranks has no use for it.
            assert [sweeps.has_torch(pid) for pid in (trials[number], *ranks[number])] == [
                False, True, True,
            ]  # fmt: skip
            if number == 0:
                sweeps.kill(ranks[0][-1])
            else:
                sweeps.kill(trials[1])
                assert sweeps.gone(lambda: set(ranks[1]) & set(ranks_of(1))), (
                    "ranks outlived their trial"
                )
                shutil.rmtree(run_of(1))
        assert len(raylets) == 2, "both trials are of one node's raylet"
        for number in range(2):
            sweeps.wait_for(process, partial(twice, number), "the second attempt")
        assert not set(ranks[0]) & set(ranks_of(0)), "a rank outlived its group"
        said, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    sweep = read_sweep("s3://sweeps/of/two")
    assert [(trial.status, trial.attempts) for trial in sweep.trials] == [("finished", 2)] * 2
    for trial in sweep.trials:
        run = run_of(trial.number)
        starts = events(run, "start")
        assert [epoch.epoch for epoch in trial.epochs] == list(range(1, 9))
        assert [start["processes"] for start in starts] == [2, 2]
        assert "MULTI_CPU" in starts[0]["distributed_type"]
        assert starts[1]["resumed_from"] is not None
        assert steps_rerun(run) == 0
    assert "rank 1 ended by SIGKILL" in str(sweep.trials[0].reason)
    assert sweep.trials[1].reason == "its process died"
    assert Folder("s3://sweeps/of/two").holds("best.yaml")
    assert "died" not in said, "Ray speaks where results are said"


FINALS = """
set: {finetune.epochs: 1, pretrain.epochs: 0}
trials: 2
search: random
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""


def test_the_finals_look_at_test_once(tiny_data: Path, tmp_path: Path) -> None:
    """Two trials and the base recipe with three seeds; all but one run have been made when the
    finals are gone on with."""
    out = tmp_path / "out"
    space = load_space(sweeps.write_space(tmp_path, tiny_data, FINALS)).as_dict()
    recorder = Recorder(Folder(out), Sweep("space", space))
    recorder.put_facts(started=1.0)
    for number, rate in enumerate((1e-3, 8e-3)):
        id_, values, results = trial_id(number), {"finetune.learning_rate": rate}, list[dict]()
        job = Job(**job_of(id_, f"runs/{id_}", values, space, str(out)))
        run_job(job, results.append)
        epochs = tuple(Epoch.from_dict(result) for result in results[:-1])
        recorder.put(Trial(id_, job.values, 0, "finished", epochs=epochs, run=job.run))
    assert not list(out.rglob("*test*"))
    recorder.put_finals(finals=enter(recorder.sweep, against_base=True))
    jobs = list(jobs_of(recorder.sweep, str(out)).values())
    assert len(jobs) == 9
    finals = list(recorder.sweep.finals)
    for number, one in enumerate(jobs[:-1]):
        scores: list[dict] = []
        run_job(one, scores.append)
        score = scores[-1]["best_NDCG@10"]
        finals[number] = dataclasses.replace(finals[number], status="finished", NDCG10=score)
        recorder.put_finals(finals=tuple(finals))
    sweep = finish_sweep(out, against_base=True)
    means = {
        system: fmean(final.NDCG10 or 0 for final in sweep.finals if final.system == system)
        for system in ("t0000", "t0001")
    }
    assert sweep.winner == max(means, key=lambda system: means[system])
    assert read_sweep(out) == sweep
    tested = {path.parent.parent.name for path in out.rglob("metrics-test.json")}
    assert tested == {sweep.winner, "base"}
    assert all((final.test is not None) == (final.system in tested) for final in sweep.finals)
    assert {final.seed for final in sweep.finals} == set(SEEDS)
    assert {final.status for final in sweep.finals} == {"finished"}
    assert sweep.comparison is not None
    assert sweep.comparison["metrics"]["NDCG@10"].keys() >= {"a", "b", "difference", "ci95"}
    assert not list((out / "finals").rglob("checkpoints"))
    assert {path.parent.parent.name for path in (out / "finals").rglob("best")} == tested
    before = {path: path.read_bytes() for path in out.rglob("metrics-test.json")}
    with pytest.raises(ValueError, match=f"{sweep.winner} was evaluated on test already .* once"):
        finish_sweep(out, against_base=True)
    assert before == {path: path.read_bytes() for path in out.rglob("metrics-test.json")}
