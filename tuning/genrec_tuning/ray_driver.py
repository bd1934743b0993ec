"""Ray's side of a sweep: it runs the trials, its callbacks keep their records current, and a
stopper ends them all. Ray reads its environment when it is imported: import this once it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper, TuneConfig
from ray.tune.execution import class_cache
from ray.tune.stopper import NoopStopper

from genrec_dist.distributed.deadline import Deadline
from genrec_tuning.record import Epoch, Trial
from genrec_tuning.space import Resources, planned_epochs
from genrec_tuning.trial import Job, ended_because, run_trial


class TrialStates(Callback):
    """Keeps the records of trials current from Ray's callbacks.

    Args:
        trials: the sweep's so far.
        ending: when all trials have to end.
        on_change: gets each trial that has changed.
        on_end: is called when a trial is over.
    """

    def __init__(
        self,
        trials: tuple[Trial, ...],
        ending: Deadline,
        on_change: Callable[[Trial], None],
        on_end: Callable[[], None] = lambda: None,
    ):
        self.trials = {trial.id: trial for trial in trials}
        self.ending, self.on_change, self.on_end = ending, on_change, on_end

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Ray stores its callbacks beside its experiment, from which a sweep is never restored."""
        return Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = Job(**trial.config["job"])
        known = self.trials.get(job.id)
        if known is None:
            recipe = job.resolved(Path(job.run))
            known = Trial(
                id=job.id,
                values=job.values,
                seed=recipe.seed,
                status="running",
                planned_epochs=planned_epochs(recipe),
                run=job.run,
            )
        # Why the attempt before this one died stays on record; why a driver left it does not.
        reason = known.reason if known.status == "running" else None
        self._put(known, status="running", reason=reason, attempts=known.attempts + 1)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._known(trial)
        if "failed" in result:
            self._put(known, status="failed", reason=str(result["failed"]))
        elif "finished" in result:
            self._put(known, status="finished")  # with the reason of its second attempt, if any
        else:
            self._put(known.with_epoch(Epoch.from_dict(result)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An attempt ended; another follows."""
        self._put(self._known(trial), reason=_failure(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._put(self._known(trial), status="failed", reason=_failure(trial))
        self.on_end()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial reported its end, or the scheduler stopped it, or all trials are ending."""
        known = self._known(trial)
        if known.status == "running" and ended_because(self.ending) is None:
            reason = f"behind others at epoch {known.last_epoch}"
            self._put(known, status="stopped", reason=reason)
        self.on_end()

    def _known(self, trial: Any) -> Trial:
        return self.trials[trial.config["job"]["id"]]

    def _put(self, trial: Trial, **changes: Any) -> None:
        trial = dataclasses.replace(trial, **changes)
        self.trials[trial.id] = trial
        self.on_change(trial)


class StopWhenDue(Stopper):
    """Ends all trials when the sweep has to end, and none before."""

    def __init__(self, ending: Deadline):
        self.ending = ending

    def __reduce__(self) -> tuple[type[Stopper], tuple[()]]:
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return ended_because(self.ending) is not None


def run_trials(
    states: TrialStates,
    config: TuneConfig,
    jobs: dict[str, Any],
    resources: Resources,
    retries: int,
    directory: Path,
) -> None:
    """Let Ray run trials to their end.

    Args:
        states: keeps their records.
        config: Ray's, with the search and the scheduler.
        jobs: Ray's `param_space`; empty where the search makes the jobs.
        resources: of each trial.
        retries: times that a trial whose process dies is started again.
        directory: for Ray's own files.
    """
    # Ray's own folder names hold the values, and can be longer than a file's name may be.
    config.trial_dirname_creator = lambda trial: (
        f"{trial.config['job']['id'].replace('/', '-')}-{trial.trial_id}"
    )
    # A process that has trained a trial trains the next one: it has its libraries loaded.
    config.reuse_actors = True
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": resources.cpu, "gpu": resources.gpu}),
        param_space=jobs,
        tune_config=config,
        run_config=tune.RunConfig(
            # A new name each time. Nothing is restored from it, so it may be torn.
            name=f"session-{time.time_ns()}",
            storage_path=str(directory.absolute()),
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[states],
            stop=StopWhenDue(states.ending),
            verbose=0,
        ),
    )
    with _quiet(), _credentials_kept_back():
        tuner.fit()


def _failure(trial: Any) -> str:
    """Why the last attempt ended, in one line, by the file in which Ray notes the failures of a
    trial."""
    try:
        notes = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):  # there is none
        return "unknown"
    last = notes.rpartition("Failure # ")[2]
    if "The actor died" in last or "ActorDiedError" in last or "ActorUnavailableError" in last:
        return "its process died"
    lines = [line.strip() for line in last.splitlines()[1:] if line.strip()]
    return lines[-1] if lines else "unknown"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's messages about failed trials out of the table: the record has the reasons."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _credentials_kept_back() -> Iterator[None]:
    """Ray copies the driver's AWS keys into each trial's runtime environment, which its agent logs
    where everyone on the machine can read; a trial has its node's own."""
    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE -= keys
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE |= keys
