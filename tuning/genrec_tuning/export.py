"""What a sweep leaves for others: `sweep.parquet` with every trial, `best.yaml` for `genrec train`,
`report.html` to look at."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.config.load import dump_recipe
from genrec_dist.report.run_files import is_number
from genrec_tuning.record import (
    Folder,
    Sweep,
    Trial,
    Value,
    best_trial,
    best_validation,
    epochs_spent,
)
from genrec_tuning.report.axis import Axis, knobs, written
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


def write_results(sweep: Sweep, directory: str | Path) -> None:
    """Write `sweep.parquet`, `report.html` and, once a trial has come to its end with a score,
    `best.yaml`.

    `directory` is the sweep's, here or at an address that fsspec knows. Each file is whole or
    absent."""
    from genrec_tuning.report.page import write_report

    write_sweep_parquet(sweep, f"{directory}/sweep.parquet")
    if best_trial(sweep) is not None:
        write_best_yaml(sweep, f"{directory}/best.yaml")
    write_report(sweep, f"{directory}/report.html")


def write_sweep_parquet(sweep: Sweep, path: str | Path) -> None:
    """One row a trial, by id: `COLUMNS`, then one column a dotted key of the space, null where it
    did not apply."""
    buffer = io.BytesIO()
    pq.write_table(table_of(sweep), buffer)
    folder, _, name = str(path).rpartition("/")
    Folder(folder or ".").write(name, buffer.getvalue())


def table_of(sweep: Sweep) -> pa.Table:
    """What `sweep.parquet` holds."""
    trials = sorted(sweep.trials, key=lambda trial: trial.id)
    rows = [_row(trial) for trial in trials]
    columns = [pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()]
    # A key of the name of a column of ours is `seed`, which that column holds already.
    axes = [axis for axis in knobs(sweep) if axis.name not in COLUMNS]
    columns += [_column(axis, [trial.values.get(axis.name) for trial in trials]) for axis in axes]
    return pa.table(columns, names=[*COLUMNS, *(axis.name for axis in axes)])


def write_best_yaml(sweep: Sweep, path: str | Path) -> None:
    """The whole recipe of the best trial, as `genrec train` takes it; its first line says whose it
    is and what it reached.

    Raises ValueError if no trial has come to its end with a score.
    """
    best = best_trial(sweep)
    found = best_validation(best) if best else None
    if best is None or found is None:
        raise ValueError(
            f"{sweep.name}: no trial has come to its end with a score, so there is no best one"
        )
    told = f"# {best.id} of the sweep {sweep.name}: validation NDCG@10 {found.NDCG10:.4f} at epoch {found.epoch}"
    recipe = recipe_of(sweep.space, best.values, f"runs/{sweep.name}-best")
    folder, _, name = str(path).rpartition("/")
    Folder(folder or ".").write(
        name, f"{' '.join(told.split())} of {best.planned_epochs}\n{dump_recipe(recipe)}"
    )


def _row(trial: Trial) -> dict[str, Any]:
    found = best_validation(trial)
    speeds = [
        epoch.tokens_per_second for epoch in trial.epochs if is_number(epoch.tokens_per_second)
    ]
    return {
        "trial": trial.id,
        "status": trial.status,
        "reason": trial.reason,
        "attempts": trial.attempts,
        "epochs": epochs_spent(trial),
        "planned_epochs": trial.planned_epochs,
        "best_epoch": found.epoch if found else None,
        "NDCG@10": found.NDCG10 if found else None,
        "HR@10": found.HR10 if found else None,
        "loss": found.loss if found else None,
        "tokens_per_second": fmean(speeds) if speeds else None,
        "seconds": max((epoch.seconds for epoch in trial.epochs), default=None),
        "seed": trial.seed,
    }


def _column(axis: Axis, values: list[Value]) -> pa.Array:
    """One type a column: truth values, whole numbers or numbers where all are such, text
    otherwise."""
    known = [value for value in values if value is not None]
    if not known:
        return pa.array(values, pa.string() if axis.kind == "choice" else pa.float64())
    if all(isinstance(value, bool) for value in known):
        return pa.array(values, pa.bool_())
    if any(isinstance(value, str | bool) for value in known):
        return pa.array(
            [None if value is None else written(value) for value in values], pa.string()
        )
    return pa.array(
        values, pa.int64() if all(isinstance(value, int) for value in known) else pa.float64()
    )
