"""What Ray tells of trials while they run, passed on to whoever keeps the record; and when Ray is to end them all."""

from __future__ import annotations

from typing import Any, Protocol

from ray.exceptions import RayActorError
from ray.tune import Callback, Stopper

from genrec_tuning.trial import Job


class Listener(Protocol):
    """Who keeps the record; `id_`: of the job that a trial carries."""

    def started(self, job: Job) -> None: ...

    def reported(self, id_: str, result: dict[str, Any]) -> None: ...

    def died(self, id_: str, reason: str) -> None: ...

    def failed(self, id_: str, reason: str) -> None: ...

    def completed(self, id_: str) -> None: ...


class Ends(Protocol):
    @property
    def reason(self) -> str | None: ...


class News(Callback):
    """Ray's callback. It is told nothing back, and of Ray's own files it needs none."""

    def __init__(self, listener: Listener | None = None):
        self.listener = listener

    def __reduce__(self) -> tuple[type[News], tuple[()]]:
        """Ray stores it beside its experiment, from which a sweep is never restored."""
        return News, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.listener:
            self.listener.started(Job(**trial.config["job"]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self.listener:
            self.listener.reported(_id(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.listener:
            self.listener.died(_id(trial), _reason(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.listener:
            self.listener.failed(_id(trial), _reason(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.listener:
            self.listener.completed(_id(trial))


class WhenOver(Stopper):
    """Ends all trials when the sweep is to end; no single one."""

    def __init__(self, ends: Ends | None = None):
        self.ends = ends

    def __reduce__(self) -> tuple[type[WhenOver], tuple[()]]:
        return WhenOver, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ends is not None and self.ends.reason is not None


def _id(trial: Any) -> str:
    return str(trial.config["job"]["id"])


def _reason(trial: Any) -> str:
    """What ended the last attempt, in one line."""
    error = trial.get_pickled_error() or trial.get_error()
    if isinstance(error, RayActorError):
        return "its process died"
    lines = str(error).strip().splitlines() if error else []
    return lines[-1] if lines else "unknown"
