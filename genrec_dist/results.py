"""The one writer of metrics and top lists, for every system alike."""

# U users, N list

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.atomic import atomic_file
from genrec_shards.keyed import keyed_permutation
from genrec_shards.prepare import Dataset
from genrec_shards.sequences import Sequences, Split, TrainedThrough
from rich.table import Table

from genrec_dist import baseline
from genrec_dist.audit import exclude_history_default
from genrec_dist.baseline.history import Histories, histories
from genrec_dist.metrics import (
    EMPTY,
    TOP,
    as_written,
    bootstrap_ci95,
    list_faults,
    metrics_from_histogram,
    rank_histogram,
    target_ranks,
)

USERS_PER_ROW_GROUP = 65_536
COLUMNS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
_SAMPLE_STREAM = 0x56A1
_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("target", pa.string()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Protocol:
    """Everything two numbers must share before they may be compared."""

    numbering: str
    """given, random or train-order."""
    ties: str
    """What was done with interactions at one time."""
    split: str
    """How sequences were cut: leave-one-out."""
    trained_through: TrainedThrough
    """n-2: validation and test targets unseen in training; n-1: refit with the validation targets."""
    exclude_history: bool | None
    """Are items of the history left out of the lists? None for a rule whose lists are the history."""
    beam: int | None = None
    """Width of the beam; None for systems without one."""
    decode: str | None = None
    """Mode of decoding; None for systems without one."""
    users: str | dict[str, int] = "all"
    """all, or {"sample": n, "seed": s} as in `sample_users`."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        *,
        exclude_history: bool | None,
        trained_through: TrainedThrough = "n-2",
        beam: int | None = None,
        decode: str | None = None,
        users: str | dict[str, int] = "all",
    ) -> Protocol:
        """The protocol of a system on this data set, whose own fields are the data set's."""
        info = dataset.info
        return cls(info.numbering, info.ties, info.split, trained_through, exclude_history, beam, decode, users)


def sample_users(num_users: int, sample: int, seed: int) -> np.ndarray:
    """int64 rows of a seeded sample of users, ascending; all of them where the sample is 0 or not smaller.

    The same rows on every machine and with every version of numpy, so that two runs can be compared on a sample.
    """
    if sample == 0 or sample >= num_users:
        return np.arange(num_users)
    return np.sort(keyed_permutation(num_users, seed, _SAMPLE_STREAM)[:sample])


def write_results(
    out_dir: str | Path,
    *,
    system: str,
    split: Split,
    dataset: Dataset,
    user_rows: np.ndarray,
    lists_UN: np.ndarray,
    scores_UN: np.ndarray,
    protocol: Protocol,
    seconds: float,
    recipe: dict[str, Any] | None,
) -> dict[str, Any]:
    """Score the lists, set the baselines beside them, write `top20-SPLIT.parquet` and `metrics-SPLIT.json`.

    `user_rows` int64[U] in any order; `lists_UN` int[U, 20] item rows, best first, -1 after the end of a short list, -2
    for a text that is no item; `scores_UN` float32[U, 20]. `seconds`: what making the lists took. Returns what the
    JSON file holds. Raises ValueError, with nothing written, if a user is missing, comes twice or was not asked for, or
    if lists and protocol contradict each other.
    """
    sequences = dataset.sequences
    _check_users(sequences, user_rows, protocol)
    order = np.argsort(user_rows)  # one order of users, so that equal lists give equal bytes
    rows, lists_UN, scores_UN = user_rows[order], lists_UN[order], scores_UN[order]
    past = histories(sequences, split, rows)
    _check_lists(lists_UN, scores_UN, past, sequences, rows, protocol)
    hist = rank_histogram(target_ranks(lists_UN, past.targets_U))
    assert hist.sum() == len(rows)
    report = {
        "system": system,
        "split": split,
        "users": len(rows),
        **metrics_from_histogram(hist),
        **list_faults(lists_UN, sequences.num_items),
        "ci95": bootstrap_ci95(hist),
        "protocol": asdict(protocol),
        "beside": _beside(dataset, split, protocol, rows),
        "users_per_second": len(rows) / seconds if seconds > 0 else None,
        "seconds": seconds,
        "recipe": recipe,
        **_provenance(),
    }
    # The inner name appears first: a metrics file never stands without the lists it was computed from.
    out = Path(out_dir)
    with atomic_file(out / f"metrics-{split}.json") as metrics_file, atomic_file(out / f"top20-{split}.parquet") as top:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        metrics_file.write_text(text, encoding="utf-8")
        _write_lists(top, sequences, rows, past.targets_U, lists_UN, scores_UN)
    return report


def run_baseline(
    name: str,
    dataset: Dataset,
    split: Split,
    out_dir: str | Path,
    *,
    trained_through: TrainedThrough = "n-2",
    exclude_history: bool | None = None,
    users: str | dict[str, int] = "all",
) -> dict[str, Any]:
    """Make the lists of a baseline and write its results; `exclude_history=None`: on where no target repeats.

    The protocol says what the rule does: counting always leaves out the history, to repeat the question does not apply.
    """
    if exclude_history is None:
        exclude_history = exclude_history_default(dataset.sequences)
    told = {"counting": True, "repeat": None}.get(name, exclude_history)
    protocol = Protocol.of(dataset, exclude_history=told, trained_through=trained_through, users=users)
    rows = _expected_users(dataset.sequences.num_users, protocol)
    start = time.perf_counter()
    lists = baseline.recommend(
        name, dataset.sequences, dataset.numbering.item_codes, split,
        exclude_history=exclude_history, trained_through=trained_through, users=rows,
    )  # fmt: skip
    return write_results(
        out_dir,
        system=name,
        split=split,
        dataset=dataset,
        user_rows=rows,
        lists_UN=lists.items_UN,
        scores_UN=lists.scores_UN,
        protocol=protocol,
        seconds=time.perf_counter() - start,
        recipe=None,
    )


def format_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A closing table out of metrics (what `write_results` returns, or {"system": ..., "HR@5": ...}).

    Each row is followed by the baselines that stand beside it, unless the table has them already; figures as .0566,
    a dash where one is missing.
    """
    rows = list(rows)
    table = Table("system", *COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    shown = set()
    for row in [*rows, *(row for metrics in rows for row in _beside_rows(metrics))]:
        cells = (str(row.get("system", "")), *(as_written(row.get(column)) for column in COLUMNS))
        if cells not in shown:
            table.add_row(*cells)
            shown.add(cells)
    return table


def _beside_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    beside = metrics.get("beside") or {}
    return [{**scores, "system": name} for name, scores in beside.items() if scores and name != metrics.get("system")]


def _expected_users(num_users: int, protocol: Protocol) -> np.ndarray:
    if isinstance(protocol.users, dict):
        return sample_users(num_users, protocol.users["sample"], protocol.users["seed"])
    if protocol.users != "all":
        raise ValueError(f'protocol.users is {protocol.users!r}: give all or {{"sample": n, "seed": s}}')
    return np.arange(num_users)


def _check_users(sequences: Sequences, user_rows: np.ndarray, protocol: Protocol) -> None:
    expected = _expected_users(sequences.num_users, protocol)
    rows, counts = np.unique(user_rows, return_counts=True)
    for text, wrong in (
        ("comes twice", rows[counts > 1]),
        ("has no list", np.setdiff1d(expected, rows)),
        ("was not asked for", np.setdiff1d(rows, expected)),
    ):
        if len(wrong):
            raise ValueError(
                f"user row {wrong[0]} {text} ({len(wrong)} such of {len(expected)}): evaluate each user once"
            )


def _check_lists(
    lists_UN: np.ndarray,
    scores_UN: np.ndarray,
    past: Histories,
    sequences: Sequences,
    rows: np.ndarray,
    protocol: Protocol,
) -> None:
    shape = (past.num_users, TOP)
    if lists_UN.shape != shape or scores_UN.shape != shape:
        raise ValueError(f"lists {lists_UN.shape} and scores {scores_UN.shape}, expected {shape}: fill up with -1")
    filled_UN = lists_UN != EMPTY
    if (filled_UN[:, 1:] & ~filled_UN[:, :-1]).any():
        raise ValueError(
            "a list has an empty place before a filled one: -1 only ends a list, -2 is a text without item"
        )
    if not np.isfinite(scores_UN[filled_UN]).all():
        raise ValueError("a listed item has a score that is not finite: its rank means nothing")
    if protocol.exclude_history:
        _check_history_is_out(lists_UN, past, sequences, rows)


def _check_history_is_out(lists_UN: np.ndarray, past: Histories, sequences: Sequences, rows: np.ndarray) -> None:
    listed_UN = (lists_UN >= 0) & (lists_UN < sequences.num_items)
    taken_UN = listed_UN & past.holds(np.arange(past.num_users)[:, None], np.where(listed_UN, lists_UN, 0))
    if taken_UN.any():
        user, place = np.argwhere(taken_UN)[0]
        item, owner = sequences.item_ids[lists_UN[user, place]], sequences.user_ids[rows[user]]
        raise ValueError(f"user {owner!r} has item {item!r} of her history listed, but exclude_history is on")


def _beside(dataset: Dataset, split: Split, protocol: Protocol, rows: np.ndarray) -> dict[str, Any]:
    exclude_history = protocol.exclude_history
    if exclude_history is None:
        exclude_history = exclude_history_default(dataset.sequences)
    return baseline.beside(
        dataset.sequences,
        dataset.numbering.item_codes,
        split,
        trained_through=protocol.trained_through,
        exclude_history=exclude_history,
        users=rows,
    )


def _provenance() -> dict[str, Any]:
    # Brings TensorBoard and torch along, which whoever only reads a table should not wait for.
    from genrec_dist.events import git_commit, versions

    return {"git": git_commit(), "versions": {"python": platform.python_version(), **versions()}}


def _write_lists(
    path: Path,
    sequences: Sequences,
    rows: np.ndarray,
    targets_U: np.ndarray,
    lists_UN: np.ndarray,
    scores_UN: np.ndarray,
) -> None:
    """Row groups of a fixed size and no time stamp: equal lists give equal bytes."""
    user_ids, item_ids = pa.array(sequences.user_ids, pa.string()), pa.array(sequences.item_ids, pa.string())
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for start in range(0, len(rows), USERS_PER_ROW_GROUP):
            part = slice(start, start + USERS_PER_ROW_GROUP)
            filled_UN = lists_UN[part] != EMPTY
            offsets = pa.array(np.concatenate([[0], filled_UN.sum(axis=1).cumsum()]), pa.int32())
            listed = lists_UN[part][filled_UN]
            columns = [
                user_ids.take(pa.array(rows[part])),
                item_ids.take(pa.array(targets_U[part])),
                pa.ListArray.from_arrays(offsets, item_ids.take(_rows_or_null(listed, sequences.num_items))),
                pa.ListArray.from_arrays(offsets, pa.array(scores_UN[part][filled_UN], pa.float32())),
            ]
            writer.write_table(pa.table(columns, schema=_SCHEMA))


def _rows_or_null(listed: np.ndarray, num_items: int) -> pa.Array:
    """A text that is no item keeps its place in the file as null."""
    return pa.array(listed, pa.int64(), mask=(listed < 0) | (listed >= num_items))
