"""A sweep by the real command: reports each epoch, fails on NaN at once, bounds its disk, stays on
loopback, leaves test alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import sweeps
from genrec_shards.file_lock import hold
from genrec_tuning.record import SWEEP_FILE, Folder, Recorder, Sweep, read_sweep
from genrec_tuning.space import Resources, load_space
from genrec_tuning.sweep import check_fits, deadline, job_of, run_sweep
from genrec_tuning.trial import Job, ended_because, epochs_of, run_job
from run_events import events

from genrec_dist.config.load import load_recipe
from genrec_dist.inference.load import load_run
from genrec_dist.report.run_files import RunFiles
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.progress import EpochReport
from genrec_dist.training.run import train

# Three trials, the first with a learning rate that ends in NaN.
SPACE = """
set: {finetune.epochs: 3, optimizer.max_grad_norm: 0}
trials: 3
search: random
scheduler: none
keep: 1
seed: 2
space:
  finetune.learning_rate: {choice: [2.0e-3, 4.0e-3, 1.0e+30]}
  pretrain.mask.strategy:
    choice:
      single: {}
      last-biased: {pretrain.mask.p: {uniform: [0.2, 0.9]}}
"""


real_sweep = pytest.mark.ranks
"""It takes a cluster of Ray and its workers, which load torch."""
SECRET = "planted-key-5f1c9e"


@dataclass(frozen=True)
class Done:
    out: Path
    space: Path
    process: subprocess.CompletedProcess[str]
    sweep: Sweep
    sockets: list[str]
    """Local addresses that Ray listened on, as hexadecimal numbers."""
    environment: dict[str, str]
    """Of a raylet."""
    ray_files: Path
    """Ray's temporary directory of this sweep."""


@pytest.fixture(scope="module")
def done(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("sweep")
    space, out = sweeps.write_space(folder, tiny_data, SPACE), folder / "out"
    process = sweeps.start(space, "--out", out, AWS_ACCESS_KEY_ID=SECRET)
    try:
        sweeps.wait_for(process, lambda: list((out / "trials").glob("*.json")), "the first trial")
        (raylet,) = [
            pid for pid in sweeps.processes("raylet/raylet") if os.getsid(pid) == process.pid
        ]
        sockets, environment = listening(process.pid), environment_of(raylet)
        command = (Path("/proc") / str(raylet) / "cmdline").read_text()
        ray_files = Path(re.findall(r"/tmp/ray/session_[^/\0]*", command)[0])
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    finished = subprocess.CompletedProcess([], process.returncode, output, errors)
    assert process.returncode == 0, errors
    yield Done(out, space, finished, read_sweep(out), sockets, environment, ray_files)
    shutil.rmtree(ray_files, ignore_errors=True)


def listening(session: int) -> list[str]:
    """Addresses of the listening sockets of a session's processes."""
    inodes = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            links = [os.readlink(link) for link in (path / "fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].split(":")[0])
    return found


def environment_of(pid: int) -> dict[str, str]:
    pairs = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@real_sweep
def test_each_epoch_is_in_the_record_as_the_run_wrote_it(done: Done) -> None:
    assert len(done.sweep.trials) == 3
    finished = [trial for trial in done.sweep.trials if trial.status == "finished"]
    assert len(finished) >= 2
    for trial in finished:
        validations = events(done.out / trial.run, "validation")
        assert [epoch.NDCG10 for epoch in trial.epochs] == [one["NDCG@10"] for one in validations]
        assert [epoch.epoch for epoch in trial.epochs] == [1, 2, 3]
        assert (trial.planned_epochs, trial.attempts) == (3, 1)
        assert all(epoch.tokens_per_second > 0 and epoch.train_loss > 0 for epoch in trial.epochs)
        assert 0 < trial.epochs[0].seconds < trial.epochs[-1].seconds
        recipe = load_recipe(done.out / trial.run / "recipe.yaml")
        assert recipe.finetune.learning_rate == trial.values["finetune.learning_rate"]
        assert recipe.pretrain.mask.p == trial.values.get("pretrain.mask.p", 0.5)


@real_sweep
def test_a_loss_that_is_no_number_fails_the_trial_at_once(done: Done) -> None:
    failed = [one for one in done.sweep.trials if one.values["finetune.learning_rate"] == 1e30]
    assert failed
    for trial in failed:
        assert (trial.status, trial.attempts) == ("failed", 1)
        assert re.search("NotFinite.* at step", str(trial.reason))
        assert len(events(done.out / trial.run, "start")) == 1


@real_sweep
def test_results_are_written_and_the_best_trials_weights_alone_are_kept(done: Done) -> None:
    best = done.sweep.best
    assert best is not None
    for name in ("best", "checkpoints"):
        assert {path.parent.name for path in (done.out / "runs").glob(f"*/{name}")} == {best.id}
    assert len(list((done.out / "runs").glob("*/events.jsonl"))) == 3
    assert load_run(done.out / best.run).model is not None
    table = pq.read_table(done.out / "sweep.parquet")
    assert table.column("trial").to_pylist() == ["t0000", "t0001", "t0002"]
    recipe = load_recipe(done.out / "best.yaml")
    assert recipe.finetune.learning_rate == best.values["finetune.learning_rate"]
    assert "t0000" in (done.out / "report.html").read_text()
    assert f"{best.id} is the best of 3 trials" in done.process.stdout
    assert "epoch 3/3" in done.process.stderr


@real_sweep
def test_a_process_that_has_trained_a_trial_trains_the_next_one(done: Done, tmp_path: Path) -> None:
    assert len({sweeps.pid_of(done.out / trial.run) for trial in done.sweep.trials}) < 3
    last = done.sweep.trials[-1]
    alone = load_recipe(done.out / last.run / "recipe.yaml", [f"run={tmp_path / 'alone'}"])
    validations = events(train(alone), "validation")
    assert [one["NDCG@10"] for one in validations] == [epoch.NDCG10 for epoch in last.epochs]


@real_sweep
def test_test_is_not_touched_and_trials_share_the_data(done: Done) -> None:
    assert [path for path in done.out.rglob("*test*") if path.is_file()] == []
    assert list(done.out.rglob("*.tar")) == list(done.out.rglob("sequences.parquet")) == []


@real_sweep
def test_ray_is_on_loopback_with_a_token_and_without_a_dashboard(done: Done) -> None:
    assert done.sockets
    beyond = {address[-8:] for address in done.sockets} - {"0100007F", "01000000"}
    assert not beyond, "listens beyond this machine"
    assert done.environment["RAY_AUTH_MODE"] == "token"
    assert len(done.environment["RAY_AUTH_TOKEN"]) == 64
    assert done.environment["RAY_USAGE_STATS_ENABLED"] == "0"


@real_sweep
def test_ray_writes_no_credentials_of_the_driver(done: Done) -> None:
    """Ray Tune copies four names of AWS into runtime environments, which its agent logs."""
    files = [path for path in done.ray_files.rglob("*") if path.is_file()]
    assert any("runtime_env" in path.name for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@real_sweep
def test_nothing_of_ray_is_left(done: Done) -> None:
    assert sweeps.gone(lambda: sweeps.processes(str(done.out))), sweeps.processes(str(done.out))


@real_sweep
def test_a_sweep_is_not_begun_over_another(done: Done, tmp_path: Path) -> None:
    before = (done.out / SWEEP_FILE).read_bytes()
    space = load_space(done.space)
    taken = "a sweep is there already: continue it with --resume, or give another --out"
    with pytest.raises(ValueError, match=taken):
        run_sweep(space, done.out)
    other = done.space.with_name("other.yaml")
    other.write_text(done.space.read_text().replace("2.0e-3", "3.0e-3"))
    changed = r"^other\.yaml: space\.finetune\.learning_rate\.choice is \[0\.003, .*\[0\.002, "
    with pytest.raises(ValueError, match=changed):
        run_sweep(load_space(other), done.out, resume=True)
    with (
        hold(done.out / ".lock", "x"),
        pytest.raises(ValueError, match="another genrec tune works on this sweep"),
    ):
        run_sweep(space, done.out, resume=True)
    with pytest.raises(ValueError, match="no sweep is there: begin it without --resume"):
        run_sweep(space, tmp_path, resume=True)
    assert (done.out / SWEEP_FILE).read_bytes() == before
    assert read_sweep(done.out) == done.sweep
    # A finished one is resumed without any work.
    sweep = run_sweep(space, done.out, resume=True)
    assert (sweep.trials, sweep.resumed) == (done.sweep.trials, 1)
    assert sweep.hours >= done.sweep.hours


# Parts of it, in this process.


@pytest.fixture
def space_file(tiny_data: Path, tmp_path: Path) -> Path:
    return sweeps.write_space(tmp_path, tiny_data, SPACE)


def test_an_epoch_is_reported_when_it_can_be_resumed_from(space_file: Path, tmp_path: Path) -> None:
    run, reports = tmp_path / "run", list[EpochReport]()

    def note(report: EpochReport) -> None:
        steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]
        assert max(steps) == report.step + 1
        reports.append(report)

    train(load_space(space_file).recipe_of({}, str(run)), on_epoch=note)
    ends = [(report.epoch, report.epochs, report.last) for report in reports]
    assert ends == [(1, 3, False), (2, 3, False), (3, 3, True)]
    validations = [event["NDCG@10"] for event in events(run, "validation")]
    assert [report.scores["NDCG@10"] for report in reports] == validations


class NodeGone(Exception):
    """Stands for the death of the node a trial runs on."""


def made(directory: str, space_file: Path) -> Job:
    """A trial of a sweep that begins at `directory`."""
    space = load_space(space_file).as_dict()
    Recorder(Folder(directory), Sweep("s", space)).put_facts(started=1.0)
    return Job(**job_of("t0000", "runs/t0000", {}, space, directory))


@pytest.mark.parametrize("kind", ["", "memory:/", "file://"])
def test_a_trial_goes_on_from_its_own_checkpoint_wherever_it_is(
    space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The node dies after two epochs. At an address, another node that has nothing of the run goes
    on with it."""
    directory, seen = f"{kind}{tmp_path}/s", list[dict]()
    job = made(directory, space_file)

    def report(result: dict) -> None:
        seen.append(result)
        if result["epoch"] == 2 and not restarted:
            raise NodeGone

    restarted = False
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node-1"))
    with pytest.raises(NodeGone):
        run_job(job, report)
    assert [result["epoch"] for result in seen] == [1, 2]
    restarted = True
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node-2"))
    seen.clear()
    run_job(job, report)
    assert [result["epoch"] for result in seen] == [1, 2, 3, 3]
    assert seen[-1]["finished"]
    run = job.local_run
    starts, steps = events(run, "start"), events(run, "step")
    assert len(starts) == 2
    assert starts[1]["resumed_from"].endswith(f"step-{seen[1]['step'] + 1:08d}")
    # The epoch is reported once its checkpoint has its name: the node may be some steps ahead of it.
    begun, again = seen[1]["step"] + 1, starts[1]["time"]
    before = [step["step"] for step in steps if step["time"] < again]
    assert before == list(range(len(before)))
    assert len(before) >= begun
    after = [step["step"] for step in steps if step["time"] > again]
    assert after == list(range(begun, seen[-1]["step"] + 1)), "not from the checkpoint to the end"
    for path in run.rglob("*") if kind else ():
        if path.is_file():
            there = job.remote_run.place(str(path.relative_to(run)))
            assert Folder(directory).files.cat_file(there) == path.read_bytes(), path


def test_a_job_is_refused_without_a_lock_or_a_sweep(
    space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(str(tmp_path / "s"), space_file)
    monkeypatch.setattr("genrec_tuning.trial.LOCK_SECONDS", 0.3)
    with (
        hold(tmp_path / "s" / "runs" / ".t0000.lock", "x"),
        pytest.raises(ValueError, match="another process still trains this run"),
    ):
        run_job(job, print)
    with pytest.raises(ValueError, match=r"elsewhere is not seen from .*--storage"):
        run_job(replace(job, directory=str(tmp_path / "elsewhere")), print)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"--address 127\.0\.0\.1:1: nobody answers"),
        (
            "http://127.0.0.1:8265",
            r"--address http://127\.0\.0\.1:8265: give HOST:PORT of the cluster's head, or auto",
        ),
    ],
)
def test_a_cluster_that_does_not_answer_is_refused_at_once(
    space_file: Path, tmp_path: Path, address: str, message: str
) -> None:
    """Ray itself asks for more than ten minutes."""
    with pytest.raises(ValueError, match=message):
        run_sweep(load_space(space_file), tmp_path / "out", address=address)


def test_data_that_no_trial_could_read_are_refused_before_anything_starts(
    space_file: Path, tmp_path: Path
) -> None:
    base = space_file.with_name("base.yaml")
    base.write_text(base.read_text().replace("data: ", "data: /nowhere"))
    with pytest.raises(ValueError, match=r"^/nowhere"):
        run_sweep(load_space(space_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resources_that_no_node_has_are_named() -> None:
    check_fits(Resources(2, 1), [{"CPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}])
    have = r"cpu 3, gpu 1: no node has that much \(there are: cpu 2, gpu 4; cpu 8, gpu 0\)"
    with pytest.raises(ValueError, match=have):
        check_fits(Resources(3, 1), [{"CPU": 2.0, "GPU": 4.0}, {"CPU": 8.0}])


def test_a_sweep_ends_when_its_time_is_up_or_a_signal_came() -> None:
    assert ended_because(deadline(None)) is ended_because(deadline(1.0)) is None
    assert ended_because(deadline(0.0)) == "the budget of 0 hours was used up"
    stopped = deadline(0.5)
    stopped.stop.number = signal.SIGTERM
    assert ended_because(stopped) == "stopped by SIGTERM"


def test_worked_seconds_leave_out_the_time_between_attempts() -> None:
    def validation(time: float, epoch: int, step: int) -> dict:
        scores = {"NDCG@10": 0.1, "HR@10": 0.2, "loss": 3.0, "stage": "finetune"}
        return {"event": "validation", "time": time, "epoch": epoch, "step": step, **scores}

    files = RunFiles(Path("run"))
    resumed_from = "runs/x/checkpoints/step-00000010"
    files.events = [
        {"event": "start", "time": 100.0, "resumed_from": None},
        validation(110.0, 0, 9),
        {"event": "checkpoint", "time": 111.0, "step": 10},
        validation(120.0, 1, 19),  # killed before its checkpoint
        {"event": "start", "time": 5000.0, "resumed_from": resumed_from},
        validation(5012.0, 1, 19),
    ]
    assert [(epoch.epoch, epoch.seconds) for epoch in epochs_of(files)] == [(1, 10.0)]
    files.events.append({"event": "checkpoint", "time": 5013.0, "step": 20})
    assert [(epoch.epoch, epoch.seconds) for epoch in epochs_of(files)] == [(1, 10.0), (2, 32.0)]
    # Killed between a checkpoint and its event, a run has only the event of its resume.
    del files.events[2], files.events[-1]
    assert [(epoch.epoch, epoch.seconds) for epoch in epochs_of(files)] == [(1, 10.0)]
