"""Top lists for one history, one user or a file of histories, in the user's own item ids."""

# B requests, N list

from __future__ import annotations

import json
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.readers.documents import parse_object

from genrec_dist.config.hub import run_folder
from genrec_dist.config.paths import data_of, recipe_of
from genrec_dist.data.encoder_input import encode_histories, offsets_of
from genrec_dist.decoding.searcher import Mode, TopItems
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.item_filter import ItemFilter, filter_items, find_rows, read_text
from genrec_dist.inference.load import LoadedRun, check_numbering, load_run
from genrec_dist.inference.request_batching import Batcher
from genrec_dist.inference.tune_mixture import chosen_mixture

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
        """One line of JSON, without what is empty."""
        fields: dict[str, Any] = {} if self.user is None else {"user": self.user}
        fields |= {"items": self.items, "scores": [round(score, 6) for score in self.scores]}
        if self.unknown_items:
            fields["unknown_items"] = self.unknown_items
        if self.invalid is not None:
            fields |= {"invalid": self.invalid, "duplicates": self.duplicates}
        return json.dumps(fields, ensure_ascii=False)


@dataclass(frozen=True)
class _Call:
    """Requests of one caller, their ids as rows."""

    histories: list[np.ndarray]
    excluded: list[np.ndarray]
    """Rows that must not be listed."""
    user_rows: list[int]
    top: int


class Recommender:
    """A loaded run that answers requests, those of many threads at once too.

    Calls that come while a batch is decoded share the next one (`request_batching.py`); a lone call
    is decoded at once. What else is in a batch moves scores by float rounding, about 1e-6, so items
    whose scores are that close can change places.

    On a CPU, `torch.set_num_threads(1)` gives the shortest latency for small models: otherwise each
    calling thread has a pool of torch's threads of its own (docs/log.md).

    Example:
        recommender = Recommender.load("runs/beauty")
        (answer,) = recommender.recommend([["83", "104", "105"]], k=10)
        answer.items, answer.scores
    """

    def __init__(
        self,
        run: LoadedRun,
        *,
        beam: int = 20,
        mode: Mode = "exact",
        exclude_history: bool | None = None,
        allow: Iterable[str] | None = None,
        block: Iterable[str] | None = None,
        mixture: Mixture | None = None,
        history_scores: HistoryScores | None = None,
    ):
        """Answer requests with a loaded run.

        Args:
            run: Of `load_run`.
            beam: Width of the beam; one narrower than a list is widened to it.
            mode: How items are scored: exact, compact, free, all, items or hybrid.
            exclude_history: Leave out items of the history; None: as the run does.
            allow: Item ids that alone may be listed; None: all.
            block: Item ids that must not be listed; None: none.
            mixture: Of mode hybrid; `load` reads the one that was chosen for the run.
            history_scores: What that mixture takes from a history alone.

        Raises:
            ValueError: An unknown mode, a beam below 1, or no item is left.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"decode mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if beam < 1:
            raise ValueError(f"beam {beam}: give a whole number of at least 1")
        self.run = run
        self.beam = beam
        self.mode = mode
        self.mixture, self.history_scores = mixture, history_scores or HistoryScores()
        self.exclude_history = (
            run.model.config.exclude_history if exclude_history is None else exclude_history
        )
        self.item_filter = filter_items(run.catalogue, allow, block)
        # `free` has no trie: what must not be listed is left out of its finished lists.
        whole = self.item_filter.is_all or mode == "free"
        self.searcher = run.searcher if whole else run.searcher.among(self.item_filter.rows)
        self._batcher: Batcher[_Call, TopItems] = Batcher(self._decode, REQUESTS_AT_ONCE)

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: torch.device | str = "cpu",
        *,
        mode: Mode | None = None,
        data: str | Path | None = None,
        checked: Future[None] | None = None,
        **options: Any,
    ) -> Recommender:
        """Load a run directory and answer requests with it.

        Args:
            run: Run directory of `genrec train`, or `hf://owner/name[@revision]`.
            device: Where the model is put.
            mode: How items are scored; None: as the run's recipe says (`decode`).
            data: Directory of `genrec prepare`, which mode hybrid makes its graph of; None: the
                one the run was trained on.
            checked: As of `load_run`.
            **options: Those of `Recommender`.

        Raises:
            ValueError: As `Recommender`, naming what is missing or damaged in the run, and for mode
                hybrid where no weights were chosen.
        """
        run = run_folder(run)
        loaded = load_run(run, device, light=True, checked=checked)
        recipe = recipe_of(run)
        mode = mode or (recipe.decode if recipe else "exact")
        if mode == "hybrid" and recipe is not None and "mixture" not in options:
            dataset = load_dataset(data or data_of(run))
            check_numbering(loaded, dataset)
            excluded = options.get("exclude_history")
            mixture = chosen_mixture(
                loaded,
                dataset,
                loaded.model.config.exclude_history if excluded is None else excluded,
                recipe.trained_through,
            )
            options["mixture"] = mixture
            options["history_scores"] = HistoryScores.of(
                dataset, "test", recipe.trained_through, mixture
            )
        return cls(loaded, mode=mode, **options)

    def recommend(
        self, requests: Sequence[Request | Sequence[str]], k: int = TOP
    ) -> list[Recommendation]:
        """The best items for each request.

        Of equal scores the smaller node of the trie comes first: fewer sub-words, then smaller
        token ids.

        Args:
            requests: Each a Request, or just a history of item ids, oldest first.
            k: Length of the lists, smaller or larger than the beam.

        Returns:
            One recommendation per request, in order. Lists are shorter where fewer items are left.

        Raises:
            ValueError: What is no request, in the thread of its caller alone.
        """
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
        catalogue = self.run.catalogue
        call = _Call(histories=[], excluded=[], user_rows=[], top=k)
        answers = []
        for item in requests:
            request = item if isinstance(item, Request) else Request(item)
            if isinstance(request.history, Mapping | Set):  # as iterables they would pass
                raise ValueError(
                    f"{reprlib.repr(request.history)} is not a history: write a list of item ids, "
                    "oldest first, or a Request"
                )
            history, unknown = find_rows(catalogue, request.history)
            blocked, _ = find_rows(catalogue, request.block)
            user = request.user
            if user is not None and not isinstance(user, str):
                raise ValueError(f"{user!r} is not a user's id: write ids as strings")
            excluded = np.concatenate([history, blocked]) if self.exclude_history else blocked
            call.histories.append(history)
            call.excluded.append(excluded)
            call.user_rows.append(-1 if user is None else catalogue.user_row.get(user, -1))
            answers.append((user, unknown))
        # What calls must share to be decoded in one batch, each list cut out of the longest: the
        # beam, if the mode has one. What `free` takes out of a list is not filled up, so its longer
        # lists do not begin with its shorter ones.
        kind: Hashable = None
        if self.mode != "all":
            kind = max(self.beam, k), k if self.mode == "free" else None
        lists = self._batcher.answer(call, kind, len(requests))
        shown = Shown.of(lists, self.item_filter, self.mode)
        return [
            Recommendation(
                user=user,
                items=[catalogue.item_ids[item] for item in lists.items[row][shown.keep_BN[row]]],
                scores=lists.scores[row][shown.keep_BN[row]].tolist(),
                unknown_items=unknown,
                invalid=None if shown.invalid_B is None else int(shown.invalid_B[row]),
                duplicates=None if shown.duplicates_B is None else int(shown.duplicates_B[row]),
            )
            for row, (user, unknown) in enumerate(answers)
        ]

    def _decode(self, calls: list[_Call]) -> list[TopItems]:
        """Calls of one kind in one batch, decoded as long as the longest list of them."""
        histories = [rows for call in calls for rows in call.histories]
        excluded = [rows for call in calls for rows in call.excluded]
        users_B = np.array([row for call in calls for row in call.user_rows], np.int64)
        items = np.concatenate([np.empty(0, np.int32), *histories])
        offsets = offsets_of(np.array([len(rows) for rows in histories], np.int64))
        encoder = encode_histories(items, offsets, users_B, self.run.layout)
        rows = np.concatenate([np.empty(0, np.int32), *excluded])
        pairs = (np.repeat(np.arange(len(users_B)), [len(part) for part in excluded]), rows)
        known = self.history_scores.probabilities(items, offsets, self.run.words.num_items)
        lists = self.searcher.search(
            encoder.to(self.searcher.device),
            beam=self.beam,
            top=max(call.top for call in calls),
            mode=self.mode,
            excluded=pairs if len(rows) else None,
            mixture=self.mixture,
            known=known,
        )
        answers, first = [], 0
        for call in calls:
            part = np.s_[first : first + len(call.user_rows), : call.top]
            answers.append(TopItems(lists.items[part], lists.scores[part]))
            first += len(call.user_rows)
        return answers


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
        # Of a row [3, -2, 3, 0]: sorted [-2, 0, 3, 3], so the second 3 is there again.
        order_BN = lists.items.argsort(axis=1, kind="stable")
        sorted_BN = np.take_along_axis(lists.items, order_BN, 1)
        again_BN = np.zeros_like(listed_BN)
        np.put_along_axis(again_BN, order_BN[:, 1:], sorted_BN[:, 1:] == sorted_BN[:, :-1], 1)
        again_BN &= listed_BN
        allowed_BN = item_filter.allowed_I[lists.items.clip(min=0)]
        return cls(listed_BN & ~again_BN & allowed_BN, (lists.items == -2).sum(1), again_BN.sum(1))


def read_requests(path: str | Path, bad: list[str] | None = None) -> Iterator[Request]:
    """Requests from JSON lines `{"history": [...], "user": ..., "block": [...]}`.

    Args:
        path: the file.
        bad: takes a message for each line that is no request, and the others are read; None stops
            at the first.

    Raises:
        ValueError: Naming file and line.
    """
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(read_text(path, "JSON lines").split("\n"), 1):
        if not line.strip():
            continue
        try:
            request = _parse_request(line, f"{path}:{number}")
        except ValueError as error:
            if bad is None:
                raise
            bad.append(str(error))
        else:
            yield request


def _parse_request(line: str, place: str) -> Request:
    remedy = 'write {"history": ["item", ...], "user": "optional"}'
    fields = parse_object(line, place, "a request", remedy)
    if not isinstance(fields.get("history"), list):
        raise ValueError(f"{place}: not a request (no list of items as history): {remedy}")
    user, block = fields.get("user"), fields.get("block", [])
    if not isinstance(block, list):
        raise ValueError(f'{place}: "block" is {json.dumps(block)[:80]}: write a list of item ids')
    for value in (*fields["history"], *block, *([] if user is None else [user])):
        if isinstance(value, bool) or not isinstance(value, str | int):
            shown = json.dumps(value)[:80]
            raise ValueError(f"{place}: {shown} is not an id: write ids as strings")
    return Request(
        history=list(map(str, fields["history"])),
        user=None if user is None else str(user),
        block=list(map(str, block)),
    )


def user_request(dataset: Dataset, run: LoadedRun, user: str) -> Request:
    """A known user's whole sequence as a request. Raises ValueError where the data lacks the user,
    or is not the run's."""
    check_numbering(run, dataset)
    sequences = dataset.sequences
    if user not in sequences.user_ids:
        raise ValueError(f"user {user!r} is not in {dataset.path}; give their items with --history")
    row = sequences.user_ids.index(user)
    items = sequences.items[sequences.offsets[row] : sequences.offsets[row + 1]]
    return Request([sequences.item_ids[item] for item in items], user)
