"""Co-occurrence kNN: what was taken near the items of the history, near in time counting more."""

# U users, I items, B users of a batch, M most candidates of one user in it, N list

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from genrec_shards.sequences import Sequences, Split, TrainedThrough

from genrec_dist.baseline.history import Histories, histories
from genrec_dist.baseline.lists import Lists, Rule, empty_lists, tie_order, without_last
from genrec_dist.baseline.training import TrainingPart, check_trained_through, training_windows
from genrec_dist.metrics import TOP
from genrec_dist.recipe import section_from

_LOW_32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours are counted; one set of defaults for all data sets."""

    window: int = 6
    """How many steps apart two items of one training part may stand to count as a pair."""
    forward: float = 1.0
    """Weight of a pair from the earlier item to the later one, divided by their distance in steps."""
    backward: float = 0.5
    """The same from the later item to the earlier one."""
    decay: float = 0.7
    """Weight of the history's items: decay^age, age 0 being the last item."""
    recent: int = 10
    """How many items at the end of the history are asked for their neighbours."""
    smoothing: float = 1.0
    """Added to both masses before their powers, so that a rare item with one lucky pair does not outweigh everything."""
    out_power: float = 0.5
    """Power of the history item's mass by which its pairs are divided; 0 does not ask how much is taken near it."""
    in_power: float = 0.5
    """The same of the candidate's mass: 0 leans to what is popular, 1 away from it."""
    batch_size: int = 1024
    """Users scored at once; it changes memory, not results."""


def settings_from(overrides: list[str] | None, values: dict[str, Any] | None = None) -> KnnSettings:
    """The defaults, changed by `values` and by `key=value`. Raises ValueError, one line, naming the key that does not fit."""
    settings = section_from(KnnSettings, dict(values or {}), overrides, "knn")
    for key, value in asdict(settings).items():
        least = 1 if key in ("window", "recent", "batch_size") else 0
        if not least <= value < float("inf"):
            raise ValueError(f"knn: {key} is {value}: it has to be {least} or above")
    return settings


def recommend(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
    top: int = TOP,
    settings: KnnSettings | None = None,
) -> Lists:
    """Top lists of these user rows (None: all with a target), as `fit` says."""
    rule = fit(
        sequences, split, exclude_history=exclude_history, trained_through=trained_through, top=top, settings=settings
    )
    return rule(sequences.history_and_target(split).users if users is None else users)


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
    settings: KnnSettings | None = None,
) -> Rule:
    """The rule of these training parts: lists by the summed neighbour weights of the user's recent items.

    Only items with a positive score are listed, so lists can be short. Scores are summed in float64 and compared in
    float32, where sums of equal terms in another order are equal; ties are listed in `tie_order`.
    Raises ValueError if training saw the split's targets.
    """
    settings = settings or KnnSettings()
    by_chance = tie_order(sequences.num_items)
    # Columns stand in tie order from here on: of two equal scores the lower column goes first.
    weights_II = neighbour_weights(sequences, split, trained_through, settings)[:, by_chance].tocsr()
    return partial(_lists, sequences, split, weights_II, by_chance, exclude_history, top, settings)


def _lists(
    sequences: Sequences,
    split: Split,
    weights_II: sp.csr_matrix,
    by_chance: np.ndarray,
    exclude_history: bool,
    top: int,
    settings: KnnSettings,
    users: np.ndarray,
) -> Lists:
    past = histories(sequences, split, users)
    lists = empty_lists(past.num_users, top + 1)
    for start, scores_BI in _score_batches(past, weights_II, settings):
        if exclude_history:
            scores_BI = _without_history(scores_BI, past, start, by_chance)
        columns_BN, values_BN = _top(scores_BI, top + 1)
        rows = slice(start, start + len(values_BN))
        width = values_BN.shape[1]
        lists.items_UN[rows, :width] = np.where(values_BN > 0, by_chance[columns_BN], -1)
        lists.scores_UN[rows, :width] = np.where(values_BN > 0, values_BN, -np.inf)
    return without_last(lists)


def neighbour_weights(
    sequences: Sequences, split: Split, trained_through: TrainedThrough, settings: KnnSettings
) -> sp.csr_matrix:
    """float64[I, I], row = item of the history, column = candidate: pairs(x, y) / ((out(x) + s)^a (in(y) + s)^b).

    pairs(x, y) sums forward/d where y follows x by d steps in a training part, and backward/d where it precedes it.
    Mass: out(x) is x's row sum, in(y) is y's column sum, both of pairs; s is the smoothing, a and b are the powers: by
    default 1, 1/2 and 1/2.
    """
    pairs_II = _pairs(sequences, split, trained_through, settings)
    out_I = np.asarray(pairs_II.sum(axis=1)).ravel()
    in_I = np.asarray(pairs_II.sum(axis=0)).ravel()
    scaled = sp.diags(_inverse_power(out_I + settings.smoothing, settings.out_power)) @ pairs_II
    return (scaled @ sp.diags(_inverse_power(in_I + settings.smoothing, settings.in_power))).tocsr()


def _pairs(sequences: Sequences, split: Split, trained_through: TrainedThrough, settings: KnnSettings) -> sp.csr_matrix:
    check_trained_through(split, trained_through)
    total = sp.csr_matrix((sequences.num_items, sequences.num_items), dtype=np.float64)
    for part in training_windows(sequences, trained_through):
        for distance in range(1, settings.window + 1):
            total = total + _pairs_at(distance, part, total.shape, settings)
    return total


def _pairs_at(distance: int, part: TrainingPart, shape: tuple[int, int], settings: KnnSettings) -> sp.csr_matrix:
    together = part.users[:-distance] == part.users[distance:]
    earlier, later = part.items[:-distance][together], part.items[distance:][together]
    forward = np.full(len(earlier), settings.forward / distance)
    backward = np.full(len(earlier), settings.backward / distance)
    rows, columns = np.concatenate([earlier, later]), np.concatenate([later, earlier])
    return sp.csr_matrix((np.concatenate([forward, backward]), (rows, columns)), shape=shape)


def _inverse_power(mass_I: np.ndarray, power: float) -> np.ndarray:
    raised_I = np.sqrt(mass_I) if power == 0.5 else mass_I**power
    return np.divide(1, raised_I, out=np.zeros_like(mass_I), where=mass_I > 0)


def asked(items: np.ndarray, offsets: np.ndarray, num_items: int, settings: KnnSettings) -> sp.csr_matrix:
    """float64 [U, I]: the weight, decay^age, at which each history's recent items are asked for their neighbours.

    `items[offsets[u]:offsets[u + 1]]` is a history, oldest first.
    """
    lengths_U = np.diff(offsets)
    ages = np.repeat(offsets[1:], lengths_U) - 1 - np.arange(len(items))
    recent = ages < settings.recent
    users = np.repeat(np.arange(len(lengths_U)), lengths_U)
    entries = (settings.decay ** ages[recent], (users[recent], items[recent]))
    return sp.csr_matrix(entries, shape=(len(lengths_U), num_items))


def _score_batches(
    past: Histories, weights_II: sp.csr_matrix, settings: KnnSettings
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(first user, float64[B, I]) of one batch of users after the other."""
    history_UI = asked(past.items, past.offsets, past.num_items, settings)
    for start in range(0, past.num_users, settings.batch_size):
        yield start, history_UI[start : start + settings.batch_size] @ weights_II


def _without_history(scores_BI: sp.csr_matrix, past: Histories, start: int, by_chance: np.ndarray) -> sp.csr_matrix:
    """The whole history scores zero, also what is too old to be asked."""
    column_of = np.empty(len(by_chance), dtype=np.int64)
    column_of[by_chance] = np.arange(len(by_chance))
    first, last = past.offsets[start], past.offsets[start + scores_BI.shape[0]]
    entries = np.ones(last - first), (past.users[first:last] - start, column_of[past.items[first:last]])
    taken_BI = sp.csr_matrix(entries, shape=scores_BI.shape)
    # An item taken twice is subtracted twice; what is not positive is no candidate.
    return scores_BI - scores_BI.multiply(taken_BI)


def _top(scores_BI: sp.csr_matrix, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64[B, n] and values float32[B, n] of the best, n = min(top, M); value 0 where there is no candidate.

    Score and column are packed into one 64-bit word (bits of a positive float32 rise with its value), so that a
    partition of plain words obeys the tie rule, which argpartition would not.
    """
    scores_BI = scores_BI.tocsr()
    lengths_B = np.diff(scores_BI.indptr)
    bits = scores_BI.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    words = np.where(scores_BI.data > 0, (bits << np.uint64(32)) | (_LOW_32 - scores_BI.indices.astype(np.uint64)), 0)
    words_BM = np.zeros((len(lengths_B), max(int(lengths_B.max(initial=0)), 1)), dtype=np.uint64)
    words_BM[np.arange(words_BM.shape[1]) < lengths_B[:, None]] = words
    if words_BM.shape[1] > top:
        words_BM = np.partition(words_BM, words_BM.shape[1] - top, axis=1)[:, -top:]
    best_BN = np.sort(words_BM, axis=1)[:, ::-1]
    values_BN = (best_BN >> np.uint64(32)).astype(np.uint32).view(np.float32)
    columns_BN = np.where(best_BN > 0, _LOW_32 - (best_BN & _LOW_32), 0).astype(np.int64)
    return columns_BN, values_BN
