"""Which point of the space comes next, and which trial goes on: Optuna and ASHA, both rebuilt from
the sweep's record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from genrec_shards.keyed_random import mixed_key
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from genrec_tuning.record import DONE, Epoch, Sweep, Trial, Value
from genrec_tuning.space import Space
from genrec_tuning.trial import METRIC

_STUDY = "sweep"


class KeyedSampler(BaseSampler):
    """A sampler whose draws for a trial depend on (seed, number of the trial) and on what is known,
    not on what was drawn before: a resumed sweep goes on with the points that an unbroken one would
    have drawn."""

    def __init__(self, space: Space):
        self.space = space
        self.inner: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        seed = mixed_key(self.space.seed, 0x7B1A, trial.number) % 2**32
        if self.space.search == "random":
            self.inner = RandomSampler(seed=seed)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # group: keys are modelled together where they apply together. constant_liar: trials
                # that still run repel.
                self.inner = TPESampler(
                    seed=seed,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                    n_startup_trials=startup(self.space),
                )
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


def startup(space: Space) -> int:
    """Trials drawn at random before the estimator is asked: a third of them, from 4 to 10."""
    return min(10, max(4, space.trials // 3))


@dataclass
class _Told:
    """Stands in for a trial: its known values, and what they were drawn from."""

    values: dict[str, Value]
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        value = self.values[name.split("@")[0]]
        self.params[name], self.distributions[name] = value, distribution
        return value

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._value(name, FloatDistribution(low, high, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._value(name, IntDistribution(low, high, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        value: Value = self._value(name, CategoricalDistribution(tuple(choices)))
        return value


def as_told(space: Space, trial: Trial) -> _Told:
    """A trial's values under the names that the sampler knows them by."""
    told = _Told(trial.values, {}, {})
    space.sample(told)
    return told


def study_of(space: Space, sweep: Sweep, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study that an unbroken sweep would have: trials that are over with their scores, the
    others waiting to be started again, each under its own number."""
    study = optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize")
    known = {trial.number: trial for trial in sweep.trials}
    for number in range(max(known, default=-1) + 1):
        trial = known.get(number)
        if trial is None:  # its file was damaged and removed
            study.enqueue_trial({})
        elif trial.status not in DONE:
            study.enqueue_trial(as_told(space, trial).params)
        else:
            told, scored = (
                as_told(space, trial),
                trial.status != "failed" and trial.best_NDCG10 is not None,
            )
            study.add_trial(
                create_trial(
                    # A failed trial counts as worse than all: the searcher keeps away from where
                    # losses are no numbers.
                    state=TrialState.COMPLETE if scored else TrialState.PRUNED,
                    value=trial.best_NDCG10 if scored else None,
                    params=told.params,
                    distributions=told.distributions,
                )
            )
    return study


class Search(OptunaSearch):
    """Ray's search by Optuna, over a study that knows the sweep's record; `config` makes a trial's
    configuration."""

    def __init__(
        self, space: Space, sweep: Sweep, config: Callable[[int, dict[str, Value]], dict[str, Any]]
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = optuna.storages.InMemoryStorage()
        study_of(space, sweep, storage)

        def ask(trial: optuna.Trial) -> dict[str, Any]:
            return config(trial.number, space.sample(trial))

        super().__init__(
            ask,
            metric=METRIC,
            mode="max",
            sampler=KeyedSampler(space),
            study_name=_STUDY,
            storage=storage,
        )

    def save(self, checkpoint_path: str) -> None:
        """Ray's own copy of the search: an empty file. Sweeps are rebuilt from their record."""
        Path(checkpoint_path).touch()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Scores on the way are the scheduler's business."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Without a result the trial is pruned without a score, which is worse than any. See
        # study_of.
        failed = error or result is None or "failed" in result
        super().on_trial_complete(trial_id, None if failed else result)


class Asha(ASHAScheduler):
    """Ray's ASHA over epochs of finetuning, told what the sweep's record knows."""

    def __init__(self, space: Space, sweep: Sweep, longest: int):
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=max(longest, space.grace),
            grace_period=space.grace,
            reduction_factor=space.reduction,
            stop_last_trials=False,
        )
        self.known = {trial.id: trial for trial in sweep.trials if trial.status != "failed"}
        for trial in self.known.values():
            if trial.status in DONE:
                self._replay(SimpleNamespace(trial_id=trial.id), trial)

    def _replay(self, shown: Any, trial: Trial) -> None:
        super().on_trial_add(None, shown)
        best = 0.0
        for epoch in trial.epochs:
            best = max(best, epoch.NDCG10)
            # Its answer was given and followed then.
            super().on_trial_result(None, shown, as_result(epoch, best))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        before = self.known.get(trial.config["job"]["id"])
        if before is not None:
            self._replay(trial, before)
        else:
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "failed" in result or "finished" in result:
            return str(TrialScheduler.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        # A trial at its last epoch ends by itself, in good order.
        return str(
            TrialScheduler.CONTINUE if result["epoch"] >= result["planned_epochs"] else decision
        )


def as_result(epoch: Epoch, best: float) -> dict[str, Any]:
    return {"epoch": epoch.epoch, METRIC: best}


def scheduler_of(space: Space, sweep: Sweep, longest: int) -> TrialScheduler:
    return Asha(space, sweep, longest) if space.scheduler == "asha" else FIFOScheduler()
