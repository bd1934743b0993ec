"""What becomes of trials, from the news of them: status, attempts and epochs, kept current and
handed on."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec_dist.distributed.signals import StopRequest
from genrec_tuning.record import Epoch, Trial
from genrec_tuning.space import planned_epochs
from genrec_tuning.trial import Job


@dataclass
class Ending:
    """Why trials should end before they are over: the time is up, or a signal came."""

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


@dataclass
class Watch:
    """Keeps trials current. `on_change` gets each trial that has changed, `on_end` is called when
    one is over."""

    trials: dict[str, Trial]
    ending: Ending
    on_change: Callable[[Trial], None]
    on_end: Callable[[], None]

    def started(self, job: Job) -> None:
        trial = self.trials.get(job.id)
        if trial is None:
            recipe = job.resolved(Path(job.run))
            trial = Trial(
                job.id,
                job.values,
                recipe.seed,
                "running",
                planned_epochs=planned_epochs(recipe),
                run=job.run,
            )
        # Why the attempt before this one died stays with it; why a driver left it does not.
        reason = trial.reason if trial.status == "running" else None
        self._put(trial, status="running", reason=reason, attempts=trial.attempts + 1)

    def reported(self, id_: str, result: dict[str, Any]) -> None:
        trial = self.trials[id_]
        if "failed" in result:
            self._put(trial, status="failed", reason=str(result["failed"]))
        elif "finished" in result:
            self._put(trial, status="finished")  # why it was tried again, if it was, stays told
        else:
            self._put(trial.with_epoch(Epoch.from_dict(result)))

    def died(self, id_: str, reason: str) -> None:
        """An attempt ended; another follows."""
        self._put(self.trials[id_], reason=reason)

    def failed(self, id_: str, reason: str) -> None:
        self._put(self.trials[id_], status="failed", reason=reason)
        self.on_end()

    def completed(self, id_: str) -> None:
        """Nothing more comes of a trial: it said why, or the scheduler stopped it, or all are
        ending."""
        trial = self.trials[id_]
        if trial.status == "running" and self.ending.reason is None:
            last = trial.epochs[-1].epoch if trial.epochs else 0
            self._put(trial, status="stopped", reason=f"behind others at epoch {last}")
        self.on_end()

    def interrupt(self, reason: str) -> None:
        """Trials that nobody works on any longer are to be gone on with."""
        for trial in list(self.trials.values()):
            if trial.status == "running":
                self._put(trial, status="interrupted", reason=reason)

    def _put(self, trial: Trial, **changes: Any) -> None:
        trial = dataclasses.replace(trial, **changes)
        self.trials[trial.id] = trial
        self.on_change(trial)
