"""A run's events in Weights & Biases, MLflow or Trackio, by Accelerate's trackers. One that fails
or is slow costs the run nothing."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from genrec_shards.atomic import write_json
from genrec_shards.readers.documents import read_object

from genrec_dist.config.used_settings import flat

IDS = "trackers.json"
"""In a run directory: the run's id in each tracker, by its name, with which a resume goes on."""
PROJECT = "genrec"
LONGEST_WAIT = 60.0
"""Seconds at the end of a run in which the trackers may catch up."""
METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")


class Trackers:
    """The trackers of a run, on a thread of their own that takes events from a queue.

    A tracker that raises is given up with one line on `warn`; the others go on."""

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        """Nothing is opened before the first event that is sent.

        Args:
            names: of `recipe.tracker`; TensorBoard's files are the event log's.
            run: the run directory.
            settings: nested keys and values that a new run of a tracker gets, the recipe.
            warn: called with a line, on the trackers' thread.
        """
        self.names = [name for name in names if name not in ("none", "tensorboard")]
        self.run, self.settings, self.warn = run, plain(settings), warn
        self._open: dict[str, Any] = {}
        self._queue: SimpleQueue[Callable[[str, Any], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, event: str, fields: Mapping[str, Any]) -> None:
        """Send the numbers of an event, as `event/field`, at its step where it has one."""
        values = {f"{event}/{k}": v for k, v in fields.items() if isinstance(v, float)}
        beside = fields.get("beside") or {}
        values |= {f"{event}/NDCG@10 of {system}": score for system, score in beside.items()}
        self._send(lambda name, tracker: _log(name, tracker, values, fields.get("step")))

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Send the scores of a metrics file and of the systems beside it: a table where the tracker
        has tables, and numbers."""
        split = metrics.get("split", "")
        rows = [(str(metrics.get("system", "genrec")), metrics)]
        rows += list((metrics.get("beside") or {}).items())
        table = [
            [system, *(row[key] for key in METRICS)]
            for system, row in rows
            if row and all(isinstance(row.get(key), float) for key in METRICS)
        ]
        values = {
            f"{split}/{key}" + (f" of {system}" if place else ""): value
            for place, (system, *scores) in enumerate(table)
            for key, value in zip(METRICS, scores, strict=True)
        }

        def send(name: str, tracker: Any) -> None:
            _log(name, tracker, values)
            if name == "wandb":
                tracker.log_table(f"{split} results", columns=["system", *METRICS], data=table)
            elif name == "mlflow":
                import mlflow

                scores = {system: dict(zip(METRICS, row, strict=True)) for system, *row in table}
                mlflow.log_dict(scores, f"{split}-results.json")

        self._send(send)

    def finish(self, report: Path | None, *, failed: bool = False) -> None:
        """Send the report where the tracker keeps files, close the runs, and wait for it, at most
        `LONGEST_WAIT` seconds."""
        if self._thread is None:
            return
        if report is not None:
            self._send(lambda name, tracker: _send_file(name, tracker, report))
        self._send(lambda name, tracker: _close(name, tracker, failed))
        self._queue.put(None)
        self._thread.join(LONGEST_WAIT)
        if self._thread.is_alive():
            self.warn(f"trackers ({', '.join(self.names)}): not done after {LONGEST_WAIT:.0f} s")
        self._thread = None

    def _send(self, action: Callable[[str, Any], None]) -> None:
        if not self.names:
            return
        self._queue.put(action)
        # With the first event, when the data workers have been forked: a fork beside a thread that
        # holds a lock could leave it locked in the child.
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="trackers")
            self._thread.start()

    def _work(self) -> None:
        for name in self.names:
            self._guarded(name, partial(self._start, name))
        while (action := self._queue.get()) is not None:
            for name, tracker in list(self._open.items()):
                self._guarded(name, partial(action, name, tracker))

    def _guarded(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # some libraries raise SystemExit
            self._open.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.warn(f"tracker {name}: {reason}: the run goes on without it")

    def _start(self, name: str) -> None:
        """Start a tracker of Accelerate's: with a new run of it, or with this run's own."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # Accelerate's logging wants it; in training it is there
        for library in ("mlflow", "alembic", "wandb"):
            logging.getLogger(library).setLevel(logging.ERROR)
        ids = read_object(self.run / IDS) if (self.run / IDS).is_file() else {}
        held = ids.get(name)
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT_OF[name](), **_options(name, self.run, held))
        tracker.main_process_only = False  # this is rank 0
        tracker.start()
        if held is None:
            tracker.store_init_configuration(self.settings)
            ids[name] = _id_of(name, tracker)
            write_json(self.run / IDS, ids)
        self._open[name] = tracker


PROJECT_OF: dict[str, Callable[[], str]] = {
    "wandb": lambda: os.environ.get("WANDB_PROJECT", PROJECT),
    "mlflow": lambda: PROJECT,  # Accelerate reads MLFLOW_EXPERIMENT_NAME
    "trackio": lambda: os.environ.get("TRACKIO_PROJECT", PROJECT),
}


def _options(name: str, run: Path, held: str | None) -> dict[str, Any]:
    """What a tracker is made with; `held`: the run's id in it."""
    title = run.resolve().name
    if name == "mlflow":
        return {"run_name": title, "run_id": held}
    if name == "trackio":
        return {"name": held or title, "resume": "allow"}
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
        raise ValueError("no API key: run wandb login, or set WANDB_MODE=offline")
    return {
        "name": title,
        "id": held,
        "resume": "allow",
        "dir": str(run),
        "settings": wandb.Settings(silent=True, console="off"),
    }


def _id_of(name: str, tracker: Any) -> str:
    started = tracker.tracker
    if name == "mlflow":
        return str(started.info.run_id)
    return str(started.id if name == "wandb" else started.name)


def _log(name: str, tracker: Any, values: dict[str, float], step: int | None = None) -> None:
    if name == "mlflow":  # which takes few signs in a metric's name
        values = {
            re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_")): values[key] for key in values
        }
    tracker.log(values, step=step)


def _send_file(name: str, tracker: Any, path: Path) -> None:
    if name == "mlflow":
        tracker.log_artifact(str(path))
    elif name == "wandb":
        import wandb

        artifact = wandb.Artifact(f"report-{tracker.tracker.id}", type="report")
        artifact.add_file(str(path))
        tracker.tracker.log_artifact(artifact)


def _close(name: str, tracker: Any, failed: bool) -> None:
    if name == "mlflow" and failed:
        import mlflow

        mlflow.end_run("FAILED")
    elif name == "wandb" and failed:
        tracker.tracker.finish(exit_code=1)
    else:
        tracker.finish()


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key; a list as text."""
    kinds = str | int | float | None
    return {k: v if isinstance(v, kinds) else str(list(v)) for k, v in flat(settings).items()}
