"""The runs that are compared: read, and checked to be seeds of one recipe under one protocol."""

# U users, S runs

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.readers.documents import read_object
from genrec_shards.splits import Split

from genrec_dist.config.load import use_current_keys, with_later_keys
from genrec_dist.config.recipe import MOVES_NO_GRADIENT
from genrec_dist.evaluation.metrics import METRICS, TOP, metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.results import lists_name

_OF_THE_DATA = ("split", "ties")
"""Fields of the protocol that a data directory settles."""
_MUST_AGREE = (*_OF_THE_DATA, "trained_through", "exclude_history", "users")
MAY_DIFFER = ("numbering", "beam", "decode")
_NOT_THE_RECIPE = frozenset(("seed", "best_epoch", "weight", "epsilon", *MOVES_NO_GRADIENT))
"""Keys in which two seeds of one recipe may differ: where things lie, what moves no gradient, and
what a training found."""
_USERS_AT_ONCE = 65_536


@dataclass(frozen=True)
class ComparedRun:
    """A run with its list and metrics files of one split."""

    path: Path
    lists: Path
    metrics: dict[str, Any]


def seeds_of(path: Path, split: Split) -> list[ComparedRun]:
    """The run that `path` is, or the runs in it. Raises ValueError where they are not seeds of one
    recipe."""
    name = f"metrics-{split}.json"
    if (path / name).is_file():
        return [_load(path, split)]
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such directory: give a run, or a folder whose folders are its seeds"
        )
    folders = sorted(
        folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )
    runs = [_load(folder, split) for folder in folders if (folder / name).is_file()]
    if not runs:
        raise ValueError(
            f"{path}: no {name} in it, nor in a folder of it: run `genrec evaluate ... --split "
            f"{split}`"
        )
    left_out = [
        folder
        for folder in folders
        if (folder / "recipe.yaml").is_file() and not (folder / name).is_file()
    ]
    if left_out:
        # Whoever compares the seeds that happen to be evaluated has chosen among them.
        raise ValueError(
            f"{left_out[0]}: a run without {name}: evaluate it too, or move it elsewhere"
        )
    _check_seeds(runs)
    return runs


def _load(path: Path, split: Split) -> ComparedRun:
    file = path / f"metrics-{split}.json"
    metrics = read_object(file, "a metrics file of this program", "evaluate again")
    try:
        if isinstance(metrics.get("recipe"), dict):
            use_current_keys(metrics["recipe"], str(file))
            if "finetune" in metrics["recipe"]:  # of a training, not of a baseline
                metrics["recipe"] = with_later_keys(metrics["recipe"])
        protocol, top = metrics["protocol"], int(metrics.get("top", TOP))
        {key: protocol[key] for key in (*_MUST_AGREE, *MAY_DIFFER)}
        {key: float(metrics[key]) for key in METRICS}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a metrics file of this program ({error}): evaluate again"
        ) from None
    lists = path / lists_name(split, top)
    if not lists.is_file():
        raise ValueError(f"{lists}: no such file: evaluate again")
    return ComparedRun(path, lists, metrics)


def _check_seeds(runs: list[ComparedRun]) -> None:
    first = runs[0]
    seeds: dict[Any, Path] = {}
    for run in runs:
        recipe, theirs = run.metrics.get("recipe") or {}, first.metrics.get("recipe") or {}
        for key in ("system", *MAY_DIFFER):
            ours, other = (
                (r.metrics.get(key), r.metrics["protocol"].get(key)) for r in (run, first)
            )
            if ours != other:
                raise ValueError(
                    f"{run.path}: not of one recipe with {first.path}: {key} differs; compare "
                    "them apart"
                )
        odd = next(
            (
                key
                for key in sorted({*recipe, *theirs} - _NOT_THE_RECIPE)
                if recipe.get(key) != theirs.get(key)
            ),
            None,
        )
        if odd is not None:
            raise ValueError(
                f"{run.path}: not of one recipe with {first.path}: {odd} differs; compare them "
                "apart"
            )
        seed = recipe.get("seed")
        if seed in seeds:
            raise ValueError(
                f"{run.path} and {seeds[seed]} both have seed {seed}: one run twice is not two "
                "seeds"
            )
        seeds[seed] = run.path


def check_protocols(runs: list[ComparedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key in _MUST_AGREE:
            ours, theirs = _protocol(first, key), _protocol(run, key)
            if ours != theirs:
                data = key in _OF_THE_DATA
                remedy = "on one data directory" if data else "under one protocol"
                raise ValueError(
                    f"{'different data: ' * data}{key} is {json.dumps(ours)} in {first.path} and "
                    f"{json.dumps(theirs)} in {run.path}: evaluate both {remedy}"
                )


def _protocol(run: ComparedRun, key: str) -> Any:
    value = run.metrics["protocol"][key]
    # Lists that are the history itself do not leave it out.
    return False if key == "exclude_history" and value is None else value


def read_ranks(runs: list[ComparedRun]) -> np.ndarray:
    """uint8[S, U]: target ranks, 0 below place 20; all files are read side by side, and must name
    the same users."""
    parts: list[np.ndarray] = []
    with_columns = [_batches(run.lists) for run in runs]
    for number, batches in enumerate(itertools.zip_longest(*with_columns)):
        for run, batch in zip(runs, batches, strict=True):
            _check_same(runs[0], run, batches[0], batch, number * _USERS_AT_ONCE)
        ranks = np.stack([batch.column("rank").to_numpy() for batch in batches])
        parts.append(np.where(ranks > TOP, 0, ranks).astype(np.uint8))
    if not parts:
        raise ValueError(f"{runs[0].lists}: no users in it: evaluate again")
    return np.concatenate(parts, axis=1)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """`user`, `target` and `rank` of so many users at a time, each batch full but the last."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := {"user", "target", "rank"} - set(file.schema_arrow.names):
                raise ValueError(
                    f"{path}: no column {min(missing)}: it was written by an older version; "
                    "evaluate again"
                )
            yield from file.iter_batches(_USERS_AT_ONCE, columns=["user", "target", "rank"])
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not a damaged page's
            raise
        raise ValueError(
            f"{path}: not readable as Parquet ({str(error).splitlines()[0]}): evaluate again"
        ) from None


def _check_same(
    first: ComparedRun,
    run: ComparedRun,
    ours: pa.RecordBatch | None,
    theirs: pa.RecordBatch | None,
    start: int,
) -> None:
    if ours is None or theirs is None or len(ours) != len(theirs):
        counts = [pq.read_metadata(one.lists).num_rows for one in (first, run)]
        raise ValueError(
            f"different data: {counts[0]:,} users in {first.lists}, {counts[1]:,} in {run.lists}: "
            "evaluate both on one data directory"
        )
    for column in ("user", "target"):
        mine, others = ours.column(column), theirs.column(column)
        if not mine.equals(others):
            at = next(
                i
                for i, pair in enumerate(zip(mine.to_pylist(), others.to_pylist(), strict=True))
                if len({*pair}) > 1
            )
            raise ValueError(
                f"different data: {column} {mine[at].as_py()!r} in row {start + at} of "
                f"{first.lists}, {others[at].as_py()!r} in that of {run.lists}: evaluate both on "
                "one data directory"
            )


def check_metrics(run: ComparedRun, ranks_U: np.ndarray) -> None:
    """A metrics file that another evaluation left would name the wrong protocol."""
    found = metrics_from_histogram(rank_histogram(ranks_U))
    odd = next((key for key in METRICS if abs(found[key] - run.metrics[key]) > 1e-9), None)
    if odd is not None:
        raise ValueError(
            f"{run.path}: the lists give {odd} {found[odd]:.6f}, metrics say "
            f"{run.metrics[odd]:.6f}: evaluate again"
        )
