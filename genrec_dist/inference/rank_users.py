"""Ranked lists of many users, window by window, over all ranks."""

# U users of a window, B users of a batch, N list

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from genrec_shards.sequences import SplitView

from genrec_dist.data.encoder_input import EncoderInput, encode_histories, ragged
from genrec_dist.data.layout import Layout
from genrec_dist.decoding.rescoring import HistoryProbabilities
from genrec_dist.decoding.searcher import Mode, Pairs, TopItems, TrieSearcher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.metrics import EMPTY, TOP
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.history_scores import HistoryScores

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
    mixture: Mixture = field(default_factory=Mixture)
    """Of mode `hybrid`."""


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
    history_scores: HistoryScores | None = None,
) -> Iterator[Window]:
    """Top items of these users after their histories, window by window in the given order.
    Collective.

    What shares a batch is a function of users, histories, batch size and `window` alone; batches
    are dealt to the ranks in turn, so no list depends on the number of ranks. All ranks get equally
    many windows.

    Args:
        searcher: The trie and the model, on this rank's device.
        layout: How histories are encoded.
        view: Histories by user row.
        user_rows_U: int64, users to rank, each once.
        decoding: How.
        ranks: Who shares the work.
        on_batch: Called on each rank with how many users all ranks have ranked since the last call.
        window: Users whose lists rank 0 holds at a time.
        history_scores: Of mode `hybrid`.

    Raises:
        Exception: On all ranks, where one fails. What may fail between two windows, such as
            writing, has to be done in a collective as well, or other ranks would not hear of it.
    """
    # Two ranks, users 7, 3, 9, 5 with histories of 4, 1, 2, 9 items, batches of two:
    #   batches (places in the window)  [1, 2] [0, 3]: by length
    #   rank 0 ranks users 3 and 9, rank 1 users 7 and 5; each sends rows (place, items, score bits)
    #   rank 0 puts them at places 1, 2 and 0, 3 of items_UN: the order of the users again
    times_seen = np.zeros(len(view.starts) if ranks.is_main else 0, np.uint8)
    for start in range(0, len(user_rows_U), window):
        window_rows = user_rows_U[start : start + window]
        rows_U = (window_rows if ranks.is_main else window_rows[:0]).astype(np.int64)
        items_UN = np.full((len(rows_U), decoding.top), EMPTY, np.int32)
        scores_UN = np.full((len(rows_U), decoding.top), -np.inf, np.float32)
        times_seen_U = np.zeros(len(rows_U), np.int64)
        batches = cut_batches((view.ends - view.starts)[window_rows], decoding.batch_size)
        # int32, of one size for all ranks; place -1: no user.
        shape = (min(decoding.batch_size, len(window_rows)), 1 + 2 * decoding.top)
        for first in range(0, len(batches), ranks.size):
            turn = batches[first : first + ranks.size]
            parcel, error = np.full(shape, -1, np.int32), None
            # Ranks without a batch take part with an empty one, so that collectives stay aligned.
            if ranks.rank < len(turn):
                places_B = turn[ranks.rank]
                try:
                    lists = rank_batch(
                        searcher, layout, view, window_rows[places_B], decoding, history_scores
                    )
                    bits_BN = np.ascontiguousarray(lists.scores, np.float32).view(np.int32)
                    columns = [places_B[:, None], lists.items, bits_BN]
                    parcel[: len(places_B)] = np.concatenate(columns, axis=1)
                except Exception as raised:
                    error = raised
            for theirs in ranks.gather(torch.from_numpy(parcel), error):
                filled = theirs.numpy()[theirs.numpy()[:, 0] >= 0]
                places_B, (items_BN, bits_BN) = filled[:, 0], np.split(filled[:, 1:], 2, axis=1)
                items_UN[places_B] = items_BN
                scores_UN[places_B] = np.ascontiguousarray(bits_BN).view(np.float32)
                np.add.at(times_seen_U, places_B, 1)
            if on_batch is not None:
                on_batch(sum(map(len, turn)))
        ranks.run_on_all(partial(check_once, times_seen_U))
        np.add.at(times_seen, rows_U, 1)
        yield Window(user_rows=rows_U, items=items_UN, scores=scores_UN)
    ranks.run_on_all(lambda: check_once(times_seen[user_rows_U]) if ranks.is_main else None)


def check_once(times_seen_U: np.ndarray) -> None:
    """Raise RuntimeError unless each user was seen once."""
    wrong = int((times_seen_U != 1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {len(times_seen_U)} users were not ranked exactly once")


def cut_batches(lengths_U: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Places of users, batch by batch: like lengths share a batch, so that short histories do not
    pay for long ones."""
    order = np.argsort(lengths_U, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class HistoryBatch:
    """The histories of a batch as a searcher takes them."""

    encoder: EncoderInput
    excluded: Pairs | None
    known: HistoryProbabilities


def encode_batch(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    history_scores: HistoryScores | None,
) -> HistoryBatch:
    """The histories of these users; arguments are those of `rank_windows`."""
    lengths_B = (view.ends - view.starts)[user_rows_B]
    flat, offsets = ragged(view.starts[user_rows_B], lengths_B)
    items = view.items[flat]
    # The whole history is excluded, also what the model's input had no room for.
    pairs = (np.repeat(np.arange(len(user_rows_B)), lengths_B), items)
    return HistoryBatch(
        encoder=encode_histories(items, offsets, user_rows_B, layout).to(searcher.device),
        excluded=pairs if decoding.exclude_history else None,
        known=(history_scores or HistoryScores()).probabilities(
            items, offsets, layout.words.num_items
        ),
    )


def rank_batch(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    history_scores: HistoryScores | None = None,
) -> TopItems:
    """Top items of the users of one batch; arguments are those of `rank_windows`. Raises ValueError
    where the device's memory is too small for the batch."""
    batch = encode_batch(searcher, layout, view, user_rows_B, decoding, history_scores)
    try:
        return searcher.search(
            batch.encoder,
            beam=decoding.beam,
            top=decoding.top,
            mode=decoding.mode,
            excluded=batch.excluded,
            mixture=decoding.mixture if decoding.mode == "hybrid" else None,
            known=batch.known,
        )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{len(user_rows_B)} users at once, beam {decoding.beam}, do not fit into the memory "
            f"of {searcher.device}: lower --batch-size"
        ) from None
