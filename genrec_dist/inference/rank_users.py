"""Ranked lists of many users, window by window, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from genrec_shards.sequences import SplitView

from genrec_dist.data.encoder_input import EncoderInput, Layout, encode_histories, ragged
from genrec_dist.data.item_graph import Graph, KnnSettings
from genrec_dist.decoding.searcher import Mode, TopItems, TrieSearcher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.metrics import EMPTY, TOP
from genrec_dist.evaluation.score_mixture import Mixture

WINDOW = 65_536
"""Users whose lists rank 0 holds at a time."""


@dataclass(frozen=True)
class Decoding:
    """How lists are made; the same for validation, evaluation and requests."""

    beam: int = 20
    """A beam narrower than `top` is widened to it."""
    top: int = TOP
    mode: Mode = "exact"
    exclude_history: bool = True
    batch_size: int = 512
    item_weight: float = 1.0
    """Of the item head in mode `hybrid`, where the model has one."""
    graph_weight: float = 0.0
    """Of the transition graph in mode `hybrid`."""
    epsilon: float = 0.1
    """As in `Mixture`."""
    graph: KnnSettings = field(default_factory=KnnSettings)
    """How the graph counts neighbours."""

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.item_weight, self.graph_weight, self.epsilon, self.graph)


@dataclass(frozen=True)
class Window:
    """The lists of some users, on rank 0; of none on the others."""

    user_rows: np.ndarray
    """int64 [U]."""
    items: np.ndarray
    """int32 [U, N] item rows as in `TopItems`."""
    scores: np.ndarray
    """float32 [U, N]."""


def rank_windows(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    on_batch: Callable[[int], None] | None = None,
    *,
    window: int = WINDOW,
    graph: Graph | None = None,
) -> Iterator[Window]:
    """Top items of these users after their histories, window by window in the given order.
    Collective.

    What shares a batch is a function of users, histories, batch size and `window` alone; batches
    are dealt to the ranks in turn, so no list depends on the number of ranks. All ranks get equally
    many windows. `on_batch` hears, on each rank, how many users all ranks together have done since.
    `graph`: of mode `hybrid`. Raises on all ranks where one fails. What may fail in between, such
    as writing, belongs into `Ranks.together`, or the others would not hear of it."""
    times_seen = np.zeros(len(view.starts) if ranks.is_main else 0, np.uint8)
    for start in range(0, len(user_rows_U), window):
        rows_U = user_rows_U[start : start + window]
        lists = _WindowLists(rows_U if ranks.is_main else rows_U[:0], decoding.top)
        _rank_window(searcher, layout, view, rows_U, decoding, ranks, lists, on_batch, graph)
        ranks.together(partial(check_once, lists.times_seen_U))
        np.add.at(times_seen, lists.rows_U, 1)
        yield Window(lists.rows_U, lists.items_UN, lists.scores_UN)
    ranks.together(lambda: check_once(times_seen[user_rows_U]) if ranks.is_main else None)


def _rank_window(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    lists: _WindowLists,
    on_batch: Callable[[int], None] | None,
    graph: Graph | None,
) -> None:
    """Decode a window's users, this rank its share of the batches, and fill rank 0's `lists`."""
    batches = cut_batches((view.ends - view.starts)[rows_U], decoding.batch_size)
    for first in range(0, len(batches), ranks.size):
        here = batches[first : first + ranks.size]
        # A rank whose turn does not come sends a batch of nobody.
        places_B = here[ranks.rank] if ranks.rank < len(here) else np.empty(0, np.int64)
        parcel, error = _parcel(min(decoding.batch_size, len(rows_U)), decoding.top), None
        try:
            if len(places_B):
                _pack(
                    parcel,
                    places_B,
                    rank_batch(searcher, layout, view, rows_U[places_B], decoding, graph),
                )
        except Exception as raised:
            error = raised
        for theirs in ranks.gather(torch.from_numpy(parcel), error):
            lists.take(theirs.numpy())
        if on_batch is not None:
            on_batch(sum(map(len, here)))


class _WindowLists:
    """A window's lists as they come in."""

    def __init__(self, rows_U: np.ndarray, top: int):
        self.rows_U = rows_U.astype(np.int64)
        self.items_UN = np.full((len(rows_U), top), EMPTY, np.int32)
        self.scores_UN = np.full((len(rows_U), top), -np.inf, np.float32)
        self.times_seen_U = np.zeros(len(rows_U), np.int64)

    def take(self, parcel: np.ndarray) -> None:
        places_B, items_BN, scores_BN = _unpack(parcel)
        self.items_UN[places_B], self.scores_UN[places_B] = items_BN, scores_BN
        np.add.at(self.times_seen_U, places_B, 1)


def check_once(times_seen_U: np.ndarray) -> None:
    """Raise RuntimeError unless each user was seen once."""
    wrong = int((times_seen_U != 1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {len(times_seen_U)} users were not ranked exactly once")


def _parcel(batch_size: int, top: int) -> np.ndarray:
    """int32 [B, 1 + 2 N], of one size for all ranks: place in the window or -1, items, the bits of
    the scores."""
    return np.full((batch_size, 1 + 2 * top), -1, np.int32)


def _pack(parcel: np.ndarray, places_B: np.ndarray, lists: TopItems) -> None:
    scores_BN = np.ascontiguousarray(lists.scores, np.float32).view(np.int32)
    parcel[: len(places_B)] = np.concatenate([places_B[:, None], lists.items, scores_BN], axis=1)


def _unpack(parcel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places [B], items [B, N], scores [B, N]) of those who are in it."""
    filled = parcel[parcel[:, 0] >= 0]
    items_BN, scores_BN = np.split(filled[:, 1:], 2, axis=1)
    return filled[:, 0], items_BN, np.ascontiguousarray(scores_BN).view(np.float32)


def cut_batches(lengths_U: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Places of users, batch by batch: like lengths share a batch, so that short histories do not
    pay for long ones."""
    order = np.argsort(lengths_U, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class _Asked:
    """The histories of a batch as a searcher takes them."""

    encoder: EncoderInput
    excluded: tuple[np.ndarray, np.ndarray] | None
    graph_prob_BN: torch.Tensor | None


def _asked(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    graph: Graph | None,
) -> _Asked:
    lengths_B = (view.ends - view.starts)[user_rows_B]
    flat, offsets = ragged(view.starts[user_rows_B], lengths_B)
    items = view.items[flat]
    # The whole history is excluded, also what the model's input had no room for.
    excluded = (
        (np.repeat(np.arange(len(user_rows_B)), lengths_B), items)
        if decoding.exclude_history
        else None
    )
    return _Asked(
        encode_histories(items, offsets, user_rows_B, layout).to(searcher.device),
        excluded,
        None if graph is None else graph.probabilities(items, offsets),
    )


def rank_batch(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    graph: Graph | None = None,
) -> TopItems:
    """Top items of the users of one batch."""
    asked = _asked(searcher, layout, view, user_rows_B, decoding, graph)
    try:
        return searcher.search(
            asked.encoder,
            beam=decoding.beam,
            top=decoding.top,
            mode=decoding.mode,
            excluded=asked.excluded,
            mixture=decoding.mixture if decoding.mode == "hybrid" else None,
            graph_prob_BN=asked.graph_prob_BN,
        )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{len(user_rows_B)} users at once, beam {decoding.beam}, do not fit into the memory of {searcher.device}: "
            "lower --batch-size"
        ) from None
