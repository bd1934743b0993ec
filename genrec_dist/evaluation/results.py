"""The one writer of metrics and top lists, for every system alike."""

# U users, N list

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.histories import (
    Histories,
    check_trained_through,
    histories,
    tied_targets,
    training_counts,
)
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split
from genrec_shards.storage.manifest import MANIFEST, load_manifest

from genrec_dist.evaluation.list_counts import Tally
from genrec_dist.evaluation.metrics import EMPTY, TOP, is_item, pessimistic_ranks, target_ranks
from genrec_dist.evaluation.protocol import Protocol, expected_users
from genrec_dist.evaluation.ranked_lists import history_listed

USERS_PER_ROW_GROUP = 65_536
_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("target", pa.string()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("rank", pa.int32()),
    ]
)


class ResultsWriter:
    """Takes top lists window by window and leaves `top{N}-SPLIT.parquet` and `metrics-SPLIT.json`,
    or nothing.

        with ResultsWriter(run, system="genrec", split="test", ...) as writer:
            for window in windows:
                writer.add(window.user_rows, window.items, window.scores)
            metrics = writer.finish(seconds, reference_scores)

    Lists are checked as they come, counted into whole numbers and written a row group at a time:
    memory does not grow with the users, and the bytes do not depend on how the lists were cut into
    windows. Both files get their names when `finish` has ended well; leaving the block without it
    leaves nothing behind."""

    def __init__(
        self,
        out_dir: str | Path,
        *,
        system: str,
        split: Split,
        dataset: Dataset,
        protocol: Protocol,
        recipe: dict[str, Any] | None,
        top: int = TOP,
    ):
        """`top`: length of the lists, at least 20; metrics are those of the first 20 places.

        Raises ValueError for a split that training has seen, and where the shards beside the data
        are made from other sequences."""
        check_trained_through(split, protocol.trained_through)
        if (
            dataset.info.hierarchy is not None
            and dataset.info.hierarchy.trained_through is not None
        ):
            check_trained_through(split, dataset.info.hierarchy.trained_through)
        if top < TOP:
            raise ValueError(f"lists of {top} items: metrics need {TOP}, give top {TOP} or more")
        _check_shards(dataset)
        self.out, self.system, self.split, self.top = Path(out_dir), system, split, top
        self.dataset, self.protocol, self.recipe = dataset, protocol, recipe
        self.expected = expected_users(dataset.sequences.history_and_target(split).users, protocol)
        self.tally = Tally(training_counts(dataset.sequences, protocol.trained_through))
        self._item_ids = pa.array(dataset.sequences.item_ids, pa.string())
        self._seen = 0
        self._group = _RowGroup(min(USERS_PER_ROW_GROUP, len(self.expected)), top)
        self._files = contextlib.ExitStack()

    def __enter__(self) -> ResultsWriter:
        # The inner name appears first: a metrics file never stands without the lists it was
        # computed from.
        self._metrics_file = self._files.enter_context(
            atomic_file(self.out / f"metrics-{self.split}.json")
        )
        lists_file = self._files.enter_context(
            atomic_file(self.out / lists_name(self.split, self.top))
        )
        self._writer = self._files.enter_context(
            pq.ParquetWriter(lists_file, _SCHEMA, compression="zstd")
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:  # after `finish` there is nothing left to undo
            error = _Abandoned()
        self._files.__exit__(type(error), error, error.__traceback__)

    def add(
        self,
        user_rows: np.ndarray,
        items: np.ndarray,
        scores: np.ndarray,
        *,
        tied_beyond: np.ndarray | None = None,
    ) -> None:
        """Take the lists of the next users, int64[n] ascending and behind all added before.

        `items` int[n, N] item rows, best first, -1 after the end of a short list, -2 for a text
        that is no item; `scores` float32[n, N]. `tied_beyond` bool[n], of a system that scores all
        items, says where the tie of the last listed item goes on beyond the list; ties then rank
        pessimistically. Raises ValueError if a user is missing, comes twice or was not asked for,
        or if lists and protocol contradict each other."""
        self._check_users(user_rows)
        shape = (len(user_rows), self.top)
        if items.shape != shape or scores.shape != shape:
            raise ValueError(
                f"lists {items.shape} and scores {scores.shape}, expected {shape}: fill up with -1"
            )
        start = 0
        while start < len(user_rows):
            part = slice(start, start + self._group.room)
            beyond = None if tied_beyond is None else tied_beyond[part]
            self._take(user_rows[part], items[part], scores[part], beyond)
            start = part.stop
        self._seen += len(user_rows)

    def finish(
        self,
        seconds: float | None,
        reference_scores: Mapping[str, Any],
        training: Mapping[str, Any] | None = None,
        lists: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Give both files their names and return what the JSON file holds.

        Args:
            seconds: what making the lists took; None where nobody knows.
            reference_scores: the baselines' scores on the same users, for the field `beside`.
            training: of a trained system, `status` of its training and `step` of its weights.
            lists: of another project's system, `name` and `sha256` of the file of lists, and how
                many are `shorter` than 20.

        Raises:
            ValueError: a user has no list.
        """
        if self._seen < len(self.expected):
            raise ValueError(_no_list(self.expected[self._seen], len(self.expected)))
        self._flush()
        num_users = len(self.expected)
        assert self.tally.num_users == num_users
        scores = self.tally.metrics()
        ci95, breakdown = scores.pop("ci95"), scores.pop("breakdown")
        report = {
            "system": self.system,
            "split": self.split,
            "users": num_users,
            **scores,
            **self.tally.fault_rates(),
            "ci95": ci95,
            "breakdown": breakdown,
            "protocol": asdict(self.protocol),
            "tied_targets": self._tied_targets(),
            "top": self.top,
            "beside": dict(reference_scores),
            "users_per_second": num_users / seconds if seconds else None,
            "seconds": seconds,
            "recipe": self.recipe,
            **({} if training is None else {"training": dict(training)}),
            **({} if lists is None else {"lists": dict(lists)}),
            **_provenance(),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self._metrics_file.write_text(text, encoding="utf-8")
        self._files.close()
        return report

    def _take(
        self,
        rows: np.ndarray,
        items: np.ndarray,
        scores: np.ndarray,
        tied_beyond: np.ndarray | None,
    ) -> None:
        past = histories(self.dataset.sequences, self.split, rows)
        _check_lists(items, scores, past, self.dataset.sequences, rows, self.protocol)
        ranks = target_ranks(items, past.targets_U)
        if tied_beyond is not None:
            ranks = pessimistic_ranks(ranks, scores, tied_beyond)
        self._group.append(rows, past, items, scores, ranks)
        if not self._group.room:
            self._flush()

    def _tied_targets(self) -> float | None:
        """Share of all targets of the split that share their time with another item of their user;
        None without times."""
        if self.dataset.timestamps is None:
            return None
        return tied_targets(self.dataset.sequences, self.dataset.timestamps)[self.split]

    def _flush(self) -> None:
        group = self._group
        if group.filled:
            lists_UN, targets_U = group.items_UN[: group.filled], group.targets_U[: group.filled]
            self.tally.add(
                lists_UN, group.ranks_U[: group.filled], targets_U, group.lengths_U[: group.filled]
            )
            self._writer.write_table(group.table(self.dataset.sequences.user_ids, self._item_ids))
            group.filled = 0

    def _check_users(self, user_rows: np.ndarray) -> None:
        """Are these the users whose turn it is?"""
        place = self._seen
        wanted = np.asarray(self.expected[place : place + len(user_rows)], dtype=np.int64)
        same = user_rows[: len(wanted)] == wanted
        if same.all() and len(wanted) == len(user_rows):
            return
        at = int(same.argmin()) if not same.all() else len(wanted)
        row, before = int(user_rows[at]), self.expected[place + at - 1] if place + at else -1
        count = len(self.expected)
        if row == before:
            raise ValueError(
                f"user row {row} comes twice ({count} users are asked for): evaluate each user once"
            )
        if row < before:
            raise ValueError(
                f"user row {row} comes after row {before}: add users in ascending order, each once"
            )
        if at < len(wanted) and row > wanted[at]:
            raise ValueError(_no_list(wanted[at], count))
        raise ValueError(
            f"user row {row} was not asked for ({count} users are): evaluate each user once"
        )


class _Abandoned(Exception):
    """Tells open files that their writer was left without `finish`."""


class _RowGroup:
    """Lists that wait for their row group to be full."""

    def __init__(self, size: int, top: int):
        self.filled = 0
        self.rows_U = np.empty(size, np.int64)
        self.targets_U = np.empty(size, np.int32)
        self.lengths_U = np.empty(size, np.int64)
        self.ranks_U = np.empty(size, np.int32)
        self.items_UN = np.empty((size, top), np.int32)
        self.scores_UN = np.empty((size, top), np.float32)

    @property
    def room(self) -> int:
        return len(self.rows_U) - self.filled

    def append(
        self,
        rows: np.ndarray,
        past: Histories,
        items: np.ndarray,
        scores: np.ndarray,
        ranks: np.ndarray,
    ) -> None:
        part = slice(self.filled, self.filled + len(rows))
        self.rows_U[part], self.targets_U[part], self.lengths_U[part] = (
            rows,
            past.targets_U,
            past.lengths_U,
        )
        self.ranks_U[part], self.items_UN[part], self.scores_UN[part] = ranks, items, scores
        self.filled = part.stop

    def table(self, user_ids: list[str], item_ids: pa.Array) -> pa.Table:
        """The rows of the file: ids instead of rows, lists without their empty places, null for a
        text without item."""
        part = slice(0, self.filled)
        filled_UN = self.items_UN[part] != EMPTY
        offsets = pa.array(np.concatenate([[0], filled_UN.sum(axis=1).cumsum()]), pa.int32())
        listed = self.items_UN[part][filled_UN]
        rows_or_null = pa.array(listed, pa.int32(), mask=~is_item(listed, len(item_ids)))
        columns = [
            pa.array([user_ids[row] for row in self.rows_U[part]], pa.string()),
            item_ids.take(pa.array(self.targets_U[part])),
            pa.ListArray.from_arrays(offsets, item_ids.take(rows_or_null)),
            pa.ListArray.from_arrays(
                offsets, pa.array(self.scores_UN[part][filled_UN], pa.float32())
            ),
            pa.array(self.ranks_U[part], pa.int32()),
        ]
        return pa.table(columns, schema=_SCHEMA)


def lists_name(split: str, top: int) -> str:
    """The file that holds the lists: top20-test.parquet."""
    return f"top{top}-{split}.parquet"


def _no_list(row: int, count: int) -> str:
    return f"user row {row} has no list ({count} users are asked for): evaluate each user once"


def _check_shards(dataset: Dataset) -> None:
    """Shards that lie in the data directory were made from its sequences, or the run was trained on
    others."""
    folder = dataset.path / "shards"
    if not (folder / MANIFEST).is_file():
        return
    manifest, sequences = load_manifest(folder), dataset.sequences
    if (
        manifest.users != sequences.num_users
        or manifest.sequences_hash != dataset.info.sequences_hash
    ):
        raise DataError(
            f"{folder / MANIFEST}: made from other sequences ({manifest.users:,} users) than "
            f"{dataset.path} holds "
            f"({sequences.num_users:,} users): run `genrec shard` again"
        )


def _check_lists(
    lists_UN: np.ndarray,
    scores_UN: np.ndarray,
    past: Histories,
    sequences: Sequences,
    rows: np.ndarray,
    protocol: Protocol,
) -> None:
    filled_UN = lists_UN != EMPTY
    if (filled_UN[:, 1:] & ~filled_UN[:, :-1]).any():
        raise ValueError(
            "a list has an empty place before a filled one: -1 only ends a list, -2 is a text "
            "without item"
        )
    if not np.isfinite(scores_UN[filled_UN]).all():
        raise ValueError("a listed item has a score that is not finite: its rank means nothing")
    if protocol.exclude_history and (taken_UN := history_listed(lists_UN, past)).any():
        user, place = np.argwhere(taken_UN)[0]
        item, owner = sequences.item_ids[lists_UN[user, place]], sequences.user_ids[rows[user]]
        raise ValueError(
            f"user {owner!r} has item {item!r} of her history listed, but exclude_history is on"
        )


def _provenance() -> dict[str, Any]:
    # Brings TensorBoard and torch along, which whoever only reads a table should not wait for.
    from genrec_dist.evaluation.provenance import git_commit, versions

    return {"git": git_commit(), "versions": {"python": platform.python_version(), **versions()}}
