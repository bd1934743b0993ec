"""What a sweep leaves for other programs: a table of every trial, which `sweep.parquet` holds, and
`best.yaml` for `genrec train`."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pyarrow as pa

from genrec_dist.config.load import dump_recipe
from genrec_dist.report.run_files import is_number
from genrec_tuning.record import Sweep, Trial, Value, show_value
from genrec_tuning.space import recipe_of

COLUMNS: dict[str, pa.DataType] = {
    "trial": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "attempts": pa.int32(),
    "epochs": pa.int32(),
    "planned_epochs": pa.int32(),
    "best_epoch": pa.int32(),
    "NDCG@10": pa.float64(),
    "HR@10": pa.float64(),
    "loss": pa.float64(),
    "tokens_per_second": pa.float64(),
    "seconds": pa.float64(),
    "seed": pa.int64(),
}
"""Columns of `sweep.parquet` before those of the space. Scores are the best epoch's on validation,
`tokens_per_second` is the mean over epochs, `seconds` all that the trial has run."""


def table_of(sweep: Sweep) -> pa.Table:
    """What `sweep.parquet` holds: one row per trial, by id; `COLUMNS`, then one column per dotted
    key of the space, null where it did not apply."""
    trials = sorted(sweep.trials, key=lambda trial: trial.id)
    rows = [_row(trial) for trial in trials]
    columns = {name: pa.array([row[name] for row in rows], COLUMNS[name]) for name in COLUMNS}
    for key, domains in sweep.keys.items():
        if key not in COLUMNS:  # such a key is `seed`, which that column holds already
            choice = any(kind == "choice" for kind, _ in domains)
            columns[key] = _column([trial.values.get(key) for trial in trials], choice)
    return pa.table(columns)


def _row(trial: Trial) -> dict[str, Any]:
    best = trial.best
    speeds = [one.tokens_per_second for one in trial.epochs if is_number(one.tokens_per_second)]
    return {
        "trial": trial.id,
        "status": trial.status,
        "reason": trial.reason,
        "attempts": trial.attempts,
        "epochs": trial.last_epoch,
        "planned_epochs": trial.planned_epochs,
        "best_epoch": best.epoch if best else None,
        "NDCG@10": best.NDCG10 if best else None,
        "HR@10": best.HR10 if best else None,
        "loss": best.loss if best else None,
        "tokens_per_second": fmean(speeds) if speeds else None,
        "seconds": max((epoch.seconds for epoch in trial.epochs), default=None),
        "seed": trial.seed,
    }


def _column(values: list[Value], choice: bool) -> pa.Array:
    """Truth values, whole numbers or numbers where all are such, text otherwise."""
    known = [value for value in values if value is not None]
    if not known:
        return pa.array(values, pa.string() if choice else pa.float64())
    if all(isinstance(value, bool) for value in known):
        return pa.array(values, pa.bool_())
    if any(isinstance(value, str | bool) for value in known):
        texts = [None if value is None else show_value(value) for value in values]
        return pa.array(texts, pa.string())
    whole = all(isinstance(value, int) for value in known)
    return pa.array(values, pa.int64() if whole else pa.float64())


def best_yaml(sweep: Sweep) -> str:
    """The whole recipe of the best trial, as `genrec train` takes it; its first line says whose it
    is and what score it reached. Raises ValueError if no trial has come to its end with a score."""
    best = sweep.best
    if best is None or best.best is None:
        raise ValueError(
            f"{sweep.name}: no trial has come to its end with a score, so there is no best one"
        )
    score, epoch = best.best.NDCG10, best.best.epoch
    head = f"{best.id} of the sweep {sweep.name}: validation NDCG@10 {score:.4f} at epoch {epoch}"
    recipe = recipe_of(sweep.space, best.values, f"runs/{sweep.name}-best")
    # A name of several lines stays in the comment.
    return f"# {' '.join(head.split())} of {best.planned_epochs}\n{dump_recipe(recipe)}"
