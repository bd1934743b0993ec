"""Top lists for one history, one user or a file of histories, in the user's own item ids."""

# B requests, N list

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from genrec_shards.dataset import Dataset

from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.decoding.searcher import Mode, TopItems, TrieSearcher
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.inference.item_filter import ItemFilter, filter_items, rows_of
from genrec_dist.inference.load import LoadedRun, check_numbering, load_run
from genrec_dist.inference.request_batching import Callers

REQUESTS_AT_ONCE = 256
"""Requests that are decoded in one batch, of one caller or of many."""


@dataclass(frozen=True)
class Request:
    history: Sequence[str]
    """Item ids, oldest first; may be empty."""
    user: str | None = None
    """A user's id; unknown or None: the model sees the history alone."""
    block: Sequence[str] = ()
    """Item ids that this answer must not list. Ids to allow are a recommender's: they make a trie
    of their own."""


@dataclass(frozen=True)
class Recommendation:
    user: str | None
    items: list[str]
    """Item ids, best first."""
    scores: list[float]
    """Natural log-probabilities of the items' texts under the mode's own softmax."""
    unknown_items: list[str]
    """Ids of the history that the catalogue lacks; they were skipped."""
    invalid: int | None = None
    """Texts among the best k that are no item, left out of the list; None in modes that give items
    alone."""
    duplicates: int | None = None
    """Texts among the best k that spell an item listed before, left out of the list; None as
    above."""

    def as_json(self) -> str:
        fields: dict[str, Any] = {} if self.user is None else {"user": self.user}
        fields |= {"items": self.items, "scores": [round(score, 6) for score in self.scores]}
        if self.unknown_items:
            fields["unknown_items"] = self.unknown_items
        if self.invalid is not None:
            fields |= {"invalid": self.invalid, "duplicates": self.duplicates}
        return json.dumps(fields, ensure_ascii=False)


@dataclass(frozen=True)
class _Piece:
    """A part of a call, its ids read as rows, a request an entry."""

    histories: list[np.ndarray]
    excluded: list[np.ndarray]
    """Rows that must not be listed."""
    user_rows: list[int]
    top: int

    def __len__(self) -> int:
        return len(self.user_rows)


class Recommender:
    """A loaded run that answers requests, those of many threads at once too.

    Calls that come while a batch is decoded share the next one (`callers.py`); a lone call is
    decoded at once. What else is in a batch moves scores by float rounding, about 1e-6, so items
    whose scores are that close can change places.

    On a CPU, `torch.set_num_threads(1)` gives the shortest latency for small models: the callers'
    threads would each bring a pool of torch's (docs/log.md)."""

    def __init__(
        self,
        run: LoadedRun,
        *,
        beam: int = 20,
        mode: Mode = "exact",
        exclude_history: bool | None = None,
        allow: Iterable[str] | None = None,
        block: Iterable[str] | None = None,
    ):
        """`exclude_history`: None asks the run. `allow`, `block`: item ids; None allows all and
        blocks none.

        Raises ValueError if no item is left.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"decode mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if beam < 1:
            raise ValueError(f"beam {beam}: give a whole number of at least 1")
        self.run = run
        self.beam = beam
        self.mode = mode
        self.exclude_history = (
            run.model.config.exclude_history if exclude_history is None else exclude_history
        )
        self.item_filter = filter_items(run.catalogue, allow, block)
        self.searcher = _make_searcher(run, self.item_filter, mode)
        self._callers: Callers[_Piece, TopItems] = Callers(self._decode, REQUESTS_AT_ONCE)

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: torch.device | str = "cpu",
        *,
        beam: int = 20,
        mode: Mode = "exact",
        exclude_history: bool | None = None,
        allow: Iterable[str] | None = None,
        block: Iterable[str] | None = None,
    ) -> Recommender:
        """From a run directory; the options are those of `Recommender`."""
        loaded = load_run(run, device)
        return cls(
            loaded, beam=beam, mode=mode, exclude_history=exclude_history, allow=allow, block=block
        )

    def recommend(
        self, requests: Sequence[Request | Sequence[str]], k: int = TOP
    ) -> list[Recommendation]:
        """The `k` best items for each request (a Request, or just a history of item ids).

        `k` may be smaller or larger than the beam, which is widened to it. Scores are natural
        log-probabilities under the mode's own softmax; of equal ones the smaller node of the trie
        comes first: fewer sub-words, then smaller token ids. Raises ValueError for what is no
        request, in the thread that asked alone."""
        return list(self.answers(requests, k))

    def answers(
        self, requests: Sequence[Request | Sequence[str]], k: int = TOP
    ) -> Iterator[Recommendation]:
        """As `recommend`, each answer as soon as its batch is decoded."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}: give a whole number of at least 1")
        if isinstance(requests, str | Request) or not isinstance(requests, Sequence):
            raise ValueError(f"{requests!r} is not a list of requests: write them as a list")
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            yield from self._answer(requests[start : start + REQUESTS_AT_ONCE], k)

    def _answer(self, requests: Sequence[Request | Sequence[str]], k: int) -> list[Recommendation]:
        asked = [
            request if isinstance(request, Request) else Request(request) for request in requests
        ]
        read = [rows_of(self.run.catalogue, request.history) for request in asked]
        histories, unknown = [rows for rows, _ in read], [ids for _, ids in read]
        piece = _Piece(
            histories,
            [self._excluded(request, rows) for request, rows in zip(asked, histories, strict=True)],
            [self._user_row(request.user) for request in asked],
            k,
        )
        lists = self._callers.ask(piece, self._kind(k), len(piece))
        shown = Shown.of(lists, self.item_filter, self.mode)
        return [
            self._recommendation(i, asked[i], unknown[i], lists, shown) for i in range(len(asked))
        ]

    def _kind(self, k: int) -> Hashable:
        """What calls must share to be decoded in one batch, each list cut out of the longest: the
        beam, if the mode has one."""
        if self.mode == "all":
            return None
        # What `free` strikes out of a list is not filled up, so a longer one does not begin with a
        # shorter one.
        return max(self.beam, k), k if self.mode == "free" else None

    def _excluded(self, request: Request, history: np.ndarray) -> np.ndarray:
        blocked, _ = rows_of(self.run.catalogue, request.block)
        return np.concatenate([history, blocked]) if self.exclude_history else blocked

    def _user_row(self, user: str | None) -> int:
        if user is not None and not isinstance(user, str):
            raise ValueError(f"{user!r} is not a user's id: write ids as strings")
        return -1 if user is None else self.run.catalogue.user_row.get(user, -1)

    def _decode(self, pieces: list[_Piece]) -> list[TopItems]:
        """Pieces of one kind in one batch, decoded as long as the longest list asked for."""
        items, offsets = _joined([rows for piece in pieces for rows in piece.histories])
        users_B = np.array([row for piece in pieces for row in piece.user_rows], np.int64)
        encoder = encode_histories(items, offsets, users_B, self.run.layout).to(
            self.searcher.device
        )
        rows, row_offsets = _joined([rows for piece in pieces for rows in piece.excluded])
        pairs = (np.repeat(np.arange(len(users_B)), np.diff(row_offsets)), rows)
        lists = self.searcher.search(
            encoder,
            beam=self.beam,
            top=max(piece.top for piece in pieces),
            mode=self.mode,
            excluded=pairs if len(rows) else None,
        )
        ends = np.cumsum([len(piece) for piece in pieces])
        return [
            TopItems(
                *(
                    values_BN[end - len(piece) : end, : piece.top]
                    for values_BN in (lists.items, lists.scores)
                )
            )
            for piece, end in zip(pieces, ends, strict=True)
        ]

    def _recommendation(
        self, place: int, request: Request, unknown: list[str], lists: TopItems, shown: Shown
    ) -> Recommendation:
        keep_N = shown.keep_BN[place]
        return Recommendation(
            request.user,
            [self.run.catalogue.item_ids[item] for item in lists.items[place][keep_N]],
            lists.scores[place][keep_N].tolist(),
            unknown,
            *(
                None if counts_B is None else int(counts_B[place])
                for counts_B in (shown.invalid_B, shown.duplicates_B)
            ),
        )


def _make_searcher(run: LoadedRun, item_filter: ItemFilter, mode: Mode) -> TrieSearcher:
    """The run's own, or one over a part of its items."""
    # `free` walks no trie: what must not be listed is left out of its finished lists.
    return (
        run.searcher
        if item_filter.is_all or mode == "free"
        else run.searcher.among(item_filter.rows)
    )


def _joined(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 rows one after another, int64 offsets)."""
    lengths = [len(part) for part in rows]
    return np.concatenate([np.empty(0, np.int32), *rows]), np.concatenate(
        [[0], np.cumsum(lengths)]
    ).astype(np.int64)


@dataclass(frozen=True)
class Shown:
    """What of decoded lists goes into answers."""

    keep_BN: np.ndarray
    """bool."""
    invalid_B: np.ndarray | None
    """int64, texts that are no item; None where none can be."""
    duplicates_B: np.ndarray | None
    """int64, texts that spell an item listed before."""

    @classmethod
    def of(cls, lists: TopItems, item_filter: ItemFilter, mode: Mode) -> Shown:
        """Only `free` gives texts that are no item, spells an item twice, or names one that must
        not be listed."""
        listed_BN = lists.items >= 0
        if mode != "free":
            return cls(listed_BN, None, None)
        order_BN = lists.items.argsort(axis=1, kind="stable")
        sorted_BN = np.take_along_axis(lists.items, order_BN, 1)
        again_BN = np.zeros_like(listed_BN)
        np.put_along_axis(again_BN, order_BN[:, 1:], sorted_BN[:, 1:] == sorted_BN[:, :-1], 1)
        again_BN &= listed_BN
        allowed_BN = item_filter.allowed_I[lists.items.clip(min=0)]
        return cls(listed_BN & ~again_BN & allowed_BN, (lists.items == -2).sum(1), again_BN.sum(1))


def read_requests(path: str | Path) -> Iterator[Request]:
    """Requests from JSON lines `{"history": [...], "user": ..., "block": [...]}`. Raises ValueError
    naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read as text ({error}): give JSON lines in UTF-8"
        ) from None
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
        raise ValueError(
            f'{place}: not a request; write {{"history": ["item", ...], "user": "optional"}}'
        )
    user, block = fields.get("user"), fields.get("block", [])
    if not isinstance(block, list):
        raise ValueError(f'{place}: "block" is {json.dumps(block)}: write a list of item ids')
    for value in (*fields["history"], *block, *([] if user is None else [user])):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{place}: {json.dumps(value)} is not an id: write ids as strings")
    return Request(
        list(map(str, fields["history"])),
        None if user is None else str(user),
        list(map(str, block)),
    )


def user_request(dataset: Dataset, run: LoadedRun, user: str) -> Request:
    """A known user's whole sequence as a request. Raises ValueError for a user the data lacks."""
    check_numbering(run, dataset)
    row = run.catalogue.user_row.get(user)
    if row is None:
        raise ValueError(f"user {user!r} is not in {dataset.path}; give her items with --history")
    sequences = dataset.sequences
    items = sequences.items[sequences.offsets[row] : sequences.offsets[row + 1]]
    return Request([sequences.item_ids[item] for item in items], user)
