"""A sweep from its first trial to its last, or from where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genrec_dist.stop import Stopped, StopRequest
from genrec_tuning.cluster import connected, session_directory
from genrec_tuning.lock import hold
from genrec_tuning.record import (
    DONE,
    RUNS,
    SPACE_FILE,
    SWEEP_FILE,
    Epoch,
    Folder,
    Recorder,
    Sweep,
    Trial,
    Value,
    read_sweep,
    trial_id,
)
from genrec_tuning.results import best_trial, write_results
from genrec_tuning.space import Space, planned_epochs, refuse_changes
from genrec_tuning.table import SweepTable
from genrec_tuning.trial import Job, as_config, run_trial

log = logging.getLogger(__name__)


@dataclass
class Ending:
    """Why a sweep should end before its trials do: its time is up, or a signal came."""

    budget_hours: float | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    started: float = field(default_factory=time.monotonic)

    @property
    def hours(self) -> float:
        return (time.monotonic() - self.started) / 3600

    @property
    def reason(self) -> str | None:
        if self.stop.number:
            return f"stopped by {signal.Signals(self.stop.number).name}"
        if self.budget_hours is not None and self.hours >= self.budget_hours:
            return f"the budget of {self.budget_hours:g} hours was used up"
        return None


def run_sweep(
    space: Space,
    out: str | Path,
    *,
    resume: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Run the trials of a space, or those that are left of it, and give the sweep's record; nothing here looks at test.

    `out`: a directory; with `storage`, an address that fsspec knows, the sweep lies there under the directory's name and `out`
    holds Ray's own files alone. A trial whose process dies is started again from its own checkpoint. Raises ValueError, one
    line, for a space that is not the one the sweep was begun with, an `out` that is taken, and a sweep without any score;
    KeyboardInterrupt and Terminated become `ending.stop`, so that the caller sees `interrupted` trials.
    """
    out = Path(out)
    folder = place_of(out, storage)
    with hold(out / ".lock", 0, "another genrec tune works on this sweep"):
        recorder = Recorder(folder, _opened(space, folder, resume))
        ending = Ending(budget_hours)
        before = recorder.sweep.hours
        recorder.put_facts(resumed=recorder.sweep.resumed + (1 if resume else 0))
        left = [number for number in range(space.trials) if not _is_done(recorder.sweep.trial(trial_id(number)))]
        if left:
            with ending.stop, SweepTable() as table:
                driver = Driver(space, recorder, ending, table.show)
                with connected(address, space.resources):
                    fit(driver, session_directory(out), len(left))
        interrupt(recorder, ending.reason or "the sweep ended")
        recorder.put_facts(hours=before + ending.hours)
        write_results(recorder.sweep, folder.address)
    close(recorder.sweep, ending)
    return recorder.sweep


def close(sweep: Sweep, ending: Ending) -> None:
    """Raise Stopped after a signal, and ValueError where no trial came to a score."""
    if ending.stop.number:
        raise Stopped(ending.stop.number, "what its trials had saved is kept", "genrec tune --resume")
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if failed and len(failed) == len(sweep.trials):
        raise ValueError(f"all {len(failed)} trials failed; the first, {failed[0].id}: {failed[0].reason}")


def told(sweep: Sweep, out: str) -> str:
    """What a sweep came to, and what to do next; a line each."""
    left = [trial.id for trial in sweep.trials if trial.status not in DONE]
    best = best_trial(sweep)
    lines = []
    if best is not None:
        lines.append(
            f"{best.id} is the best of {len(sweep.trials)}: validation NDCG@10 {best.best_NDCG10:.4f}; {out}/best.yaml"
        )
    if left:
        reason = next((trial.reason for trial in sweep.trials if trial.id == left[0]), None)
        lines.append(f"{len(left)} trials were interrupted ({reason}): go on with --resume")
    elif best is not None and not sweep.finals:
        lines.append(f"next: genrec tune --finish --out {out}")
    return "\n".join(lines)


def place_of(out: Path, storage: str | None) -> Folder:
    """Where a sweep lies."""
    return Folder(out.absolute()) if storage is None else Folder(storage) / out.absolute().name


def _is_done(trial: Trial | None) -> bool:
    return trial is not None and trial.status in DONE


def _opened(space: Space, folder: Folder, resume: bool) -> Sweep:
    """The sweep's record: a new one, or what is there."""
    there = folder.holds(SWEEP_FILE)
    if there and not resume:
        raise ValueError(
            f"{folder.address}: a sweep is there already: continue it with --resume, or give another --out"
        )
    if resume and not there:
        raise ValueError(f"{folder.address}: no sweep is there: begin it without --resume")
    if there:
        sweep = read_sweep(folder.address)
        refuse_changes(sweep.space, json.loads(json.dumps(space.as_dict())), f"{space.name}.yaml")
        return dataclasses.replace(sweep, space=space.as_dict())
    folder.write(SPACE_FILE, yaml.safe_dump(space.as_dict(), sort_keys=False))
    return Sweep(space.name, space.as_dict(), started=time.time())


def interrupt(recorder: Recorder, reason: str) -> None:
    """Trials that nobody works on any longer are to be gone on with."""
    for trial in recorder.sweep.trials:
        if trial.status == "running":
            recorder.put(dataclasses.replace(trial, status="interrupted", reason=reason))


class Driver:
    """What the driver of a sweep does with news of its trials: it writes them down."""

    def __init__(self, space: Space, recorder: Recorder, ending: Ending, show: Callable[[Sweep], None]):
        self.space, self.recorder, self.ending, self.show = space, recorder, ending, show
        interrupt(recorder, "the driver was gone")

    def put(self, trial: Trial) -> None:
        self.recorder.put(trial)
        self.show(self.recorder.sweep)

    def started(self, job: Job) -> None:
        trial = self.recorder.sweep.trial(job.id)
        if trial is None:
            recipe = job.resolved(Path(job.run))
            trial = Trial(job.id, job.values, recipe.seed, "running", planned_epochs=planned_epochs(recipe), run=job.run)
        # Why the attempt before this one died stays with it; why a driver left it does not.
        reason = trial.reason if trial.status == "running" else None
        self.put(dataclasses.replace(trial, status="running", reason=reason, attempts=trial.attempts + 1))

    def reported(self, id_: str, result: dict[str, Any]) -> None:
        trial = self.trial(id_)
        if "failed" in result:
            self.put(dataclasses.replace(trial, status="failed", reason=str(result["failed"])))
        elif "finished" in result:
            self.put(dataclasses.replace(trial, status="finished", reason=None))
        else:
            self.put(trial.with_epoch(Epoch.from_dict(result)))

    def died(self, id_: str, reason: str) -> None:
        """An attempt ended; another follows."""
        self.put(dataclasses.replace(self.trial(id_), reason=reason))

    def failed(self, id_: str, reason: str) -> None:
        self.put(dataclasses.replace(self.trial(id_), status="failed", reason=reason))
        self.ended()

    def completed(self, id_: str) -> None:
        """Nothing more comes of the trial: it said why, or the scheduler stopped it, or the sweep is ending."""
        trial = self.trial(id_)
        if trial.status == "running" and self.ending.reason is None:
            last = trial.epochs[-1].epoch if trial.epochs else 0
            self.put(dataclasses.replace(trial, status="stopped", reason=f"behind others at epoch {last}"))
        self.ended()

    def ended(self) -> None:
        drop_weights(self.recorder.folder, self.recorder.sweep, self.space.keep)
        write_results(self.recorder.sweep, self.recorder.folder.address)

    def trial(self, id_: str) -> Trial:
        found = self.recorder.sweep.trial(id_)
        assert found is not None, id_
        return found


@dataclass(frozen=True)
class Configure:
    """Makes a trial's configuration for Ray of its number and values."""

    space: Space
    directory: str

    def __call__(self, number: int, values: dict[str, Value]) -> dict[str, Any]:
        run = f"{RUNS}/{trial_id(number)}"
        recipe = self.space.recipe_of(values, run).as_dict()
        return as_config(job_of(trial_id(number), self.directory, run, recipe, values, self.space))


def job_of(
    id_: str, directory: str, run: str, recipe: dict[str, Any], values: dict[str, Value], space: Space
) -> Job:
    resources = space.resources
    return Job(
        id=id_, directory=directory, run=run, recipe=recipe, values=values,
        processes=resources.processes, gpu=resources.gpu, cpu=resources.cpu,
    )  # fmt: skip


def drop_weights(folder: Folder, sweep: Sweep, keep: int) -> None:
    """Remove checkpoints and `best/` of trials that are over, but for the best `keep` by validation."""
    over = [trial for trial in sweep.trials if trial.status in DONE]
    scored = [trial for trial in over if trial.status != "failed" and trial.best_NDCG10 is not None]
    kept = sorted(scored, key=lambda trial: (-(trial.best_NDCG10 or 0.0), trial.id))[:keep]
    for trial in over:
        if trial not in kept:
            for part in ("checkpoints", "best"):
                _remove(folder, f"{trial.run}/{part}")


def _remove(folder: Folder, name: str) -> None:
    if folder.is_local:
        shutil.rmtree(folder.place(name), ignore_errors=True)
    elif folder.holds(name):
        folder.files.rm(folder.place(name), recursive=True)


def fit(driver: Driver, ray_directory: Path, trials: int) -> None:
    """Let Ray run what is left of a sweep's trials."""
    from ray import tune

    from genrec_tuning.news import News, WhenOver
    from genrec_tuning.search import Search, scheduler_of

    space, sweep = driver.space, driver.recorder.sweep
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": space.resources.cpu, "gpu": space.resources.gpu}),
        param_space={},
        tune_config=tune.TuneConfig(
            num_samples=trials,
            search_alg=Search(space, sweep, Configure(space, driver.recorder.folder.address)),
            scheduler=scheduler_of(space, sweep, _longest(space)),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            # Never restored from, so it may be torn, or there already: each session has its own.
            name=f"session-{sweep.resumed}-{int(time.time())}",
            storage_path=str(ray_directory.absolute()),
            failure_config=tune.FailureConfig(max_failures=space.retries),
            callbacks=[News(driver)],
            stop=WhenOver(driver.ending),
            verbose=0,
        ),
    )
    with _quiet():
        tuner.fit()


def _longest(space: Space) -> int:
    """Most epochs that a trial of the space has."""
    from genrec_tuning.space import points

    return max(planned_epochs(space.recipe_of(values, "runs/trial")) for values in points(space.space))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's warnings about what the sweep knows better (trials that fail are in its record) stay out of the table."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
