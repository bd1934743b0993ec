"""Top lists for one history, one user, a file of histories or all users, in the user's own item ids."""

# B requests, N list

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from genrec_shards.atomic import atomic_file
from genrec_shards.prepare import Dataset
from genrec_shards.sequences import SplitView

from genrec_dist.batch import encode_histories
from genrec_dist.evaluate import TOP, Decoding, check_numbering, rank_users
from genrec_dist.run import LoadedRun, load_run

REQUESTS_AT_ONCE = 256
_SCHEMA = pa.schema([("user", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class Request:
    history: Sequence[str]
    """Item ids, oldest first; may be empty."""
    user: str | None = None
    """A user's id; unknown or None: the model sees the history alone."""


@dataclass(frozen=True)
class Recommendation:
    user: str | None
    items: list[str]
    """Item ids, best first."""
    scores: list[float]
    """Log-probabilities."""
    unknown_items: list[str]
    """Ids of the history that the catalogue lacks; they were skipped."""

    def as_json(self) -> str:
        fields: dict[str, Any] = {} if self.user is None else {"user": self.user}
        fields |= {"items": self.items, "scores": [round(score, 6) for score in self.scores]}
        if self.unknown_items:
            fields["unknown_items"] = self.unknown_items
        return json.dumps(fields, ensure_ascii=False)


class Recommender:
    """A loaded run that answers requests."""

    def __init__(self, run: LoadedRun, *, beam: int = TOP, exclude_history: bool | None = None):
        self.run = run
        self.beam = beam
        self.exclude_history = run.model.config.exclude_history if exclude_history is None else exclude_history

    @classmethod
    def load(cls, run: str | Path, device: torch.device | str = "cpu", **options: Any) -> Recommender:
        return cls(load_run(run, device), **options)

    def recommend(self, requests: Sequence[Request | Sequence[str]], k: int = TOP) -> list[Recommendation]:
        """The `k` best items for each request (a Request, or just a history of item ids)."""
        return list(self.answers(requests, k))

    def answers(self, requests: Sequence[Request | Sequence[str]], k: int = TOP) -> Iterator[Recommendation]:
        """As `recommend`, each answer as soon as its batch is decoded."""
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            some = requests[start : start + REQUESTS_AT_ONCE]
            yield from self._batch([r if isinstance(r, Request) else Request(history=list(r)) for r in some], k)

    def _batch(self, asked: list[Request], k: int) -> list[Recommendation]:
        rows, unknown = zip(*(self._rows(request.history) for request in asked), strict=True)
        users_B = np.array([self._user_row(request.user) for request in asked], np.int64)
        lengths_B = np.array([len(history) for history in rows])
        items = np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int64)
        encoder = encode_histories(items, offsets, users_B, self.run.layout).to(self.run.searcher.device)
        excluded = (np.repeat(np.arange(len(asked)), lengths_B), items) if self.exclude_history else None
        lists = self.run.searcher.search(encoder, beam=self.beam, top=k, excluded=excluded)
        return [
            self._recommendation(request, lists.items[i], lists.scores[i], unknown[i])
            for i, request in enumerate(asked)
        ]

    def _rows(self, history: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        row_of = self.run.catalogue.item_row
        known = [row_of[item] for item in history if item in row_of]
        return np.array(known, np.int32), [item for item in history if item not in row_of]

    def _user_row(self, user: str | None) -> int:
        return -1 if user is None else self.run.catalogue.user_row.get(user, -1)

    def _recommendation(
        self, request: Request, items_N: np.ndarray, scores_N: np.ndarray, unknown: list[str]
    ) -> Recommendation:
        listed = items_N >= 0
        ids = [self.run.catalogue.item_ids[item] for item in items_N[listed]]
        return Recommendation(request.user, ids, scores_N[listed].tolist(), unknown)


def read_requests(path: str | Path) -> Iterator[Request]:
    """Requests from JSON lines `{"history": [...], "user": ...}`. Raises ValueError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}): give JSON lines in UTF-8") from None
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parse_request(line, f"{path}:{number}")


def _parse_request(line: str, place: str) -> Request:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("history"), list):
        raise ValueError(f'{place}: not a request; write {{"history": ["item", ...], "user": "optional"}}')
    user = fields.get("user")
    for value in (*fields["history"], *([] if user is None else [user])):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{place}: {json.dumps(value)} is not an id: write ids as strings")
    return Request([str(item) for item in fields["history"]], None if user is None else str(user))


def user_request(dataset: Dataset, run: LoadedRun, user: str) -> Request:
    """A known user's whole sequence as a request. Raises ValueError for a user the data lacks."""
    check_numbering(run, dataset)
    row = run.catalogue.user_row.get(user)
    if row is None:
        raise ValueError(f"user {user!r} is not in {dataset.path}; give her items with --history")
    sequences = dataset.sequences
    items = sequences.items[sequences.offsets[row] : sequences.offsets[row + 1]]
    return Request([sequences.item_ids[item] for item in items], user)


def recommend_all(
    run: LoadedRun,
    dataset: Dataset,
    out: str | Path,
    decoding: Decoding,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> Path | None:
    """Lists for all users after their whole sequences: `OUT/top20.parquet` (user, items, scores), each user once."""
    check_numbering(run, dataset)
    sequences = dataset.sequences
    nothing = np.full(sequences.num_users, -1, np.int32)
    view = SplitView("test", sequences.items, sequences.offsets[:-1], sequences.offsets[1:], nothing)
    users_U = np.arange(sequences.num_users)
    lists = rank_users(
        run.searcher, run.layout, view, users_U, decoding, rank=rank, world_size=world_size, on_batch=on_batch
    )
    if rank != 0:
        return None
    ids = np.array(sequences.item_ids, object)
    table = pa.table(
        {
            "user": sequences.user_ids,
            "items": [ids[row[row >= 0]].tolist() for row in lists.items],
            "scores": [scores[row >= 0].tolist() for row, scores in zip(lists.items, lists.scores, strict=True)],
        },
        schema=_SCHEMA,
    )
    path = Path(out) / f"top{decoding.top}.parquet"
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
    return path
