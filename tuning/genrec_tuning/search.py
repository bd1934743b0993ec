"""Which point of the space comes next, and which trial goes on: Optuna and ASHA by way of Ray Tune,
both rebuilt from the sweep's record, never from files of Ray's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from genrec_shards.keyed_random import mixed_key
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from genrec_tuning.record import DONE, Sweep, Trial, Value
from genrec_tuning.space import Domain, Space
from genrec_tuning.trial import METRIC

_STUDY = "sweep"


class KeyedSampler(BaseSampler):
    """A sampler whose draws for a trial depend on (seed, number of the trial) and on the known
    scores, not on earlier draws: a resumed sweep continues with the points that an unbroken one
    would have drawn."""

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
                self.inner = TPESampler(
                    seed=seed,
                    multivariate=True,
                    group=True,  # keys are modelled together where they apply together
                    constant_liar=True,  # trials that still run repel
                    # Drawn at random before the estimator is used: a third of the trials, 4 to 10.
                    n_startup_trials=min(10, max(4, self.space.trials // 3)),
                )
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, *args: Any) -> dict[str, Any]:
        return self.inner.infer_relative_search_space(*args)

    def sample_relative(self, *args: Any) -> dict[str, Any]:
        return self.inner.sample_relative(*args)

    def sample_independent(self, *args: Any) -> Any:
        return self.inner.sample_independent(*args)


def _drawing_from(trial: optuna.Trial | FixedTrial) -> Callable[[str, Domain], Value]:
    """A `draw` for `Space.sample` that asks one of Optuna's trials."""

    def draw(name: str, domain: Domain) -> Value:
        log = domain.kind.startswith("log")
        if domain.kind in ("uniform", "loguniform"):
            return float(trial.suggest_float(name, domain.low, domain.high, log=log))
        if domain.kind in ("int", "logint"):
            return int(trial.suggest_int(name, int(domain.low), int(domain.high), log=log))
        chosen: Value = trial.suggest_categorical(name, domain.corners)
        return chosen

    return draw


class _ByKey(dict[str, Any]):
    """Values by recipe key that are found by the names of their draws too: `key@branch`."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).split("@")[0])

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name.split("@")[0])


def study_of(space: Space, sweep: Sweep, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study that an unbroken sweep would have: trials that are over with their scores, the
    others waiting to be started again, each under its own number."""
    study = optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize")
    known = {trial.number: trial for trial in sweep.trials}
    for number in range(max(known, default=-1) + 1):
        trial = known.get(number)
        if trial is None:  # its file was damaged and removed
            study.enqueue_trial({})
            continue
        replayed = FixedTrial(_ByKey(trial.values))
        space.sample(_drawing_from(replayed))
        if trial.status not in DONE:
            study.enqueue_trial(replayed.params)
            continue
        # A failed trial counts as worse than all, so that the search keeps away from where losses
        # are no numbers.
        best = trial.best if trial.status != "failed" else None
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if best else TrialState.PRUNED,
                value=best.NDCG10 if best else None,
                params=replayed.params,
                distributions=replayed.distributions,
            )
        )
    return study


class Search(OptunaSearch):
    """Ray's search by Optuna over a study that knows the sweep's record.

    Args:
        space: the sweep's.
        sweep: its record so far.
        config: makes a trial's configuration of its number and values.
    """

    def __init__(
        self, space: Space, sweep: Sweep, config: Callable[[int, dict[str, Value]], dict[str, Any]]
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = optuna.storages.InMemoryStorage()
        study_of(space, sweep, storage)

        def suggest(trial: optuna.Trial) -> dict[str, Any]:
            return config(trial.number, space.sample(_drawing_from(trial)))

        super().__init__(
            suggest,
            metric=METRIC,
            mode="max",
            sampler=KeyedSampler(space),
            study_name=_STUDY,
            storage=storage,
        )

    def save(self, checkpoint_path: str) -> None:
        """Leave Ray's own copy of the search empty: a sweep is rebuilt from its record."""
        Path(checkpoint_path).touch()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: scores before the last are the scheduler's business."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # Without a result the trial is pruned without a score, as in `study_of`.
        failed = error or result is None or "failed" in result
        super().on_trial_complete(trial_id, None if failed else result)


class Asha(ASHAScheduler):
    """Ray's ASHA over epochs of the last stage that knows the sweep's record.

    Args:
        space: the sweep's.
        sweep: its record so far.
        longest: most epochs that a trial of the space has.
    """

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
        """Report a trial's epochs again; the decisions were made and followed then."""
        super().on_trial_add(None, shown)
        best = 0.0
        for epoch in trial.epochs:
            best = max(best, epoch.NDCG10)
            super().on_trial_result(None, shown, {"epoch": epoch.epoch, METRIC: best})

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
        ends = result["epoch"] >= result["planned_epochs"]
        return str(TrialScheduler.CONTINUE if ends else decision)


def scheduler_of(space: Space, sweep: Sweep, longest: int) -> TrialScheduler:
    """ASHA, or Ray's scheduler that stops nobody. See `Asha` for the arguments."""
    return Asha(space, sweep, longest) if space.scheduler == "asha" else FIFOScheduler()
