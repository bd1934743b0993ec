"""What the transition graph and the items' texts expect after each prefix of the training parts,
for a decoder to learn."""

# U users, S prefixes, N items, n items of one training part, m distinct ones, K items kept

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import flat_ranges, offsets_of
from genrec_shards.splits import TrainedThrough

from genrec_dist.config.recipe import Distill
from genrec_dist.data.item_graph import (
    KnnSettings,
    forward_pairs,
    inverse_power,
    recent_item_weights,
)
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.evaluation.score_mixture import TextTerm
from genrec_dist.text.similarity import TextSimilarity

EPSILON = 0.1
"""How much of each of the two distributions is uniform."""
TEXT_WEIGHT = 0.3
"""Weight of the texts' logarithm beside that of the graph."""
_ENTRIES_AT_ONCE = 4_000_000


class GraphWithoutUser:
    """The transition graph of all training parts but one."""

    def __init__(self, pairs_NN: sp.csr_matrix, settings: KnnSettings):
        """`pairs_NN`: weighted pairs of all training parts."""
        self.pairs_NN, self.settings = pairs_NN, settings
        self.out_N = np.asarray(pairs_NN.sum(1)).ravel()
        self.in_N = np.asarray(pairs_NN.sum(0)).ravel()

    def shares(self, items: np.ndarray) -> np.ndarray:
        """float64 [n - 1, N]: after each prefix of a training part, as `Graph.probabilities`, of
        the pairs of the other training parts. With its own pairs a prefix would know what comes
        after it."""
        settings, length = self.settings, len(items)
        distinct_m, places = np.unique(items, return_inverse=True)
        own_mm = np.zeros((len(distinct_m), len(distinct_m)))
        for step in range(1, min(settings.window, length - 1) + 1):
            earlier, later = places[:-step], places[step:]
            np.add.at(own_mm, (earlier, later), settings.forward / step)
            np.add.at(own_mm, (later, earlier), settings.backward / step)
        rows_mN = self.pairs_NN[distinct_m].toarray()
        rows_mN[:, distinct_m] -= own_mm
        rows_mN[rows_mN < 1e-9] = 0  # what rounding leaves of a pair that is the user's alone
        out_m = np.maximum(self.out_N[distinct_m] - own_mm.sum(1), 0) + settings.smoothing
        in_N = self.in_N.copy()
        in_N[distinct_m] -= own_mm.sum(0)
        in_N = np.maximum(in_N, 0) + settings.smoothing
        rows_mN *= inverse_power(out_m, settings.out_power)[:, None]
        rows_mN *= inverse_power(in_N, settings.in_power)
        prefixes, offsets = prefixes_of(places)
        weights = recent_item_weights(
            prefixes, offsets, len(distinct_m), settings.recent, settings.decay
        )
        scores = np.asarray(weights @ rows_mN)
        sums = scores.sum(1, keepdims=True)
        shares: np.ndarray = np.divide(scores, sums, out=np.zeros_like(scores), where=sums > 0)
        return shares


def prefixes_of(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All prefixes but the whole, one after another, and where each begins; the end, too."""
    lengths = np.arange(1, len(items))
    return items[flat_ranges(np.zeros_like(lengths), lengths)], offsets_of(lengths)


def make_teacher(
    dataset: Dataset,
    trained_through: TrainedThrough,
    distill: Distill,
    graph: KnnSettings,
    text: TextTerm | None,
    *,
    exclude_history: bool,
) -> Teacher:
    """The distribution after each prefix: the graph's share, mixed with a uniform one, times the
    texts' to the power `TEXT_WEIGHT`. Of the training parts alone; a user's own pairs are left
    out.

    Args:
        dataset: items of which are compared by their texts where `text` is given.
        trained_through: where the training parts end.
        distill: weight, temperature, and how many items are kept.
        graph: how pairs are counted and weighted.
        text: which texts are compared and how.
        exclude_history: leave out the prefix's own items, as lists do.
    """
    sequences, num_items = dataset.sequences, dataset.sequences.num_items
    forward_NN = forward_pairs(sequences, trained_through, graph.window)
    pairs_NN = (graph.forward * forward_NN + graph.backward * forward_NN.T).tocsr()
    others, similarity = GraphWithoutUser(pairs_NN, graph), TextSimilarity.of(dataset, text)
    starts_U = sequences.offsets[:-1]
    lengths_U = sequences.training_ends(trained_through) - starts_U
    first_U = offsets_of(np.maximum(lengths_U - 1, 0))
    top = min(distill.top, num_items)
    items_SK = np.zeros((first_U[-1], top), np.int32)
    shares_SK = np.zeros((first_U[-1], top), np.float32)
    # Users whose prefixes together fill a block.
    block_U = first_U[:-1] * num_items // _ENTRIES_AT_ONCE
    users = np.flatnonzero(lengths_U > 1)
    for part in np.split(users, np.flatnonzero(np.diff(block_U[users])) + 1):
        if not len(part):
            continue
        parts = [sequences.items[starts_U[u] :][: lengths_U[u]].astype(np.int64) for u in part]
        score_SN = np.concatenate([others.shares(items) for items in parts])
        score_SN = np.log((1 - EPSILON) * score_SN + EPSILON / num_items)
        prefixes = [prefixes_of(items) for items in parts]
        history = np.concatenate([items for items, _ in prefixes])
        offsets = offsets_of(np.concatenate([np.diff(bounds) for _, bounds in prefixes]))
        if similarity is not None:
            near_SN = similarity.probabilities(history.astype(np.int32), offsets).numpy()
            score_SN += TEXT_WEIGHT * np.log((1 - EPSILON) * near_SN + EPSILON / num_items)
        if exclude_history:
            score_SN[np.repeat(np.arange(len(score_SN)), np.diff(offsets)), history] = -np.inf
        found_SK = np.argpartition(-score_SN, top - 1, axis=1)[:, :top]
        kept_SK = np.take_along_axis(score_SN, found_SK, 1) / distill.temperature
        kept_SK = np.exp(kept_SK - kept_SK.max(1, keepdims=True))
        rows = slice(first_U[part[0]], first_U[part[-1] + 1])
        items_SK[rows] = found_SK
        shares_SK[rows] = distill.weight * kept_SK / kept_SK.sum(1, keepdims=True)
    return Teacher(first_U[:-1], items_SK, shares_SK)
