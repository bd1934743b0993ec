"""Ray's side of a sweep: what it tells of trials while they run, when it is to end them all, and
how it is set going."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrec_shards.ray_engine.session import started
from ray import tune
from ray.tune import Callback, Stopper, TuneConfig

from genrec_tuning.space import Resources
from genrec_tuning.trial import Job, run_trial
from genrec_tuning.trial_states import Ending, Watch


def run_trials(
    watch: Watch,
    config: TuneConfig,
    jobs: dict[str, Any],
    resources: Resources,
    retries: int,
    directory: Path,
) -> None:
    """Let Ray run the trials that `jobs` (its `param_space`) or the searcher of `config` asks for;
    `directory` holds its files."""
    config.trial_dirname_creator = _folder_name
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": resources.cpu, "gpu": resources.gpu}),
        param_space=jobs,
        tune_config=config,
        run_config=tune.RunConfig(
            # A name of its own each time. Nothing is restored from it, so it may be torn.
            name=f"session-{time.time_ns()}",
            storage_path=str(directory.absolute()),
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[News(watch)],
            stop=WhenOver(watch.ending),
            verbose=0,
        ),
    )
    with _quiet():
        tuner.fit()


class News(Callback):
    """Ray's callback: it passes on, and keeps nothing."""

    def __init__(self, watch: Watch | None = None):
        self.watch = watch

    def __reduce__(self) -> tuple[type[News], tuple[()]]:
        """Ray stores it beside its experiment, from which a sweep is never restored."""
        return News, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.watch:
            self.watch.started(Job(**trial.config["job"]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self.watch:
            self.watch.reported(_id(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.watch:
            self.watch.died(_id(trial), _reason(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.watch:
            self.watch.failed(_id(trial), _reason(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.watch:
            self.watch.completed(_id(trial))


class WhenOver(Stopper):
    """Ends all trials when the sweep is to end; no single one."""

    def __init__(self, ending: Ending | None = None):
        self.ending = ending

    def __reduce__(self) -> tuple[type[WhenOver], tuple[()]]:
        return WhenOver, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ending is not None and self.ending.reason is not None


def _folder_name(trial: Any) -> str:
    """Of Ray's folder: its own names hold the values, and can be longer than a file's name may
    be."""
    return f"{_id(trial).replace('/', '-')}-{trial.trial_id}"


def _id(trial: Any) -> str:
    return str(trial.config["job"]["id"])


def _reason(trial: Any) -> str:
    """What ended the last attempt, in one line, by the file in which Ray notes each failure of a
    trial."""
    try:
        told = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):  # there is none
        return "unknown"
    return reason_of(told)


def reason_of(told: str) -> str:
    """The last failure in Ray's notes, in one line."""
    last = told.rpartition("Failure # ")[2]
    if "The actor died" in last or "ActorDiedError" in last or "ActorUnavailableError" in last:
        return "its process died"
    lines = [line.strip() for line in last.splitlines()[1:] if line.strip()]
    return lines[-1] if lines else "unknown"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Ray says of trials that fail stays out of the table: the record says which, and why."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(before)


SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Signals are the sweep's, and trials stay where the driver is: paths mean the same there.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A failed trial's last report has no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}

OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes: trials exchange a few numbers an epoch, their data lie in
shards."""


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on
    loopback, that ends with it.

    Raises ValueError if the cluster cannot be reached, or has no node that a trial fits on.
    """
    with started(
        address, "--address", object_store_bytes=OBJECT_STORE_BYTES, settings=SETTINGS
    ) as ray:
        check_fits(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield


def check_fits(resources: Resources, nodes: list[dict[str, float]]) -> None:
    """Ray would wait for a node that never comes. Raises ValueError naming what no node has."""
    if any(
        node.get("CPU", 0) >= resources.cpu and node.get("GPU", 0) >= resources.gpu
        for node in nodes
    ):
        return
    have = "; ".join(f"cpu {node.get('CPU', 0):g}, gpu {node.get('GPU', 0):g}" for node in nodes)
    raise ValueError(
        f"resources_per_trial: cpu {resources.cpu:g}, gpu {resources.gpu:g}: no node has that much (there are: {have}); "
        "a trial lies on one node"
    )
