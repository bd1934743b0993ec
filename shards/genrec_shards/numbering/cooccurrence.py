"""Item vectors from what is taken near what in the training parts: PPMI of co-occurrence, cut to
its largest factors."""

# N items, D dims

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genrec_shards.numbering.truncated_eigen import factor_rows
from genrec_shards.sequences import Sequences, flat_ranges

if TYPE_CHECKING:
    import scipy.sparse as sp

WINDOW = 6
"""How many steps apart two items of one training part may be to count as a pair."""


def training_items(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """(items int32, user rows int64) of t_1..t_{n-2} of all users, in row order."""
    starts = sequences.offsets[:-1]
    lengths = sequences.training_ends("n-2") - starts
    users = np.repeat(np.arange(sequences.num_users), lengths)
    return sequences.items[flat_ranges(starts, lengths)], users


def training_counts(sequences: Sequences) -> np.ndarray:
    """int64[N], how often each item is in a training part t_1..t_{n-2}."""
    return np.bincount(training_items(sequences)[0], minlength=sequences.num_items)


def cooccurrence_vectors(sequences: Sequences, dims: int, seed: int) -> np.ndarray:
    """float64[N, D], D = min(dims, N): near each other where items have the same neighbours in the
    training parts.

    The factors of positive pointwise mutual information: max(0, log of how much more often than by
    chance two items are together). A row of zeros for an item without a neighbour. Held-out
    interactions are not looked at."""
    import scipy.sparse as sp

    weights_NN = cooccurrences(sequences, WINDOW)
    mass_N = np.asarray(weights_NN.sum(axis=1)).ravel()
    pairs = weights_NN.tocoo()
    values = np.log(pairs.data * mass_N.sum() / (mass_N[pairs.row] * mass_N[pairs.col]))
    above = values > 0
    places = (pairs.row[above], pairs.col[above])
    pmi_NN = sp.csr_matrix((values[above], places), shape=weights_NN.shape)
    return factor_rows(pmi_NN, dims, seed)


def neighbour_vectors(sequences: Sequences, dims: int, seed: int) -> np.ndarray:
    """float64[N, D], D = min(dims, N): the largest factors of co-occurrence over the square roots
    of both items' masses.

    The measure of `baseline knn`, both ways alike; more of an item's neighbours are near it than by
    `cooccurrence_vectors` (docs/log.md). A row of zeros for an item without a neighbour. Held-out
    interactions are not looked at."""
    import scipy.sparse as sp

    weights_NN = cooccurrences(sequences, WINDOW)
    # One more, so that a rare item with one lucky pair does not outweigh everything.
    scale = sp.diags(1 / np.sqrt(np.asarray(weights_NN.sum(axis=1)).ravel() + 1))
    return factor_rows((scale @ weights_NN @ scale).tocsr(), dims, seed)


def cooccurrences(sequences: Sequences, window: int) -> sp.csr_matrix:
    """float64[N, N], symmetric: the sum of 1/distance over all pairs at most `window` steps apart
    in a training part."""
    import scipy.sparse as sp

    items, users = training_items(sequences)
    earlier, later, weights = [], [], []
    for distance in range(1, window + 1):
        one, other = items[:-distance], items[distance:]
        counts = (users[:-distance] == users[distance:]) & (one != other)
        earlier.append(one[counts])
        later.append(other[counts])
        weights.append(np.full(len(later[-1]), 1 / distance))
    rows, columns, data = (np.concatenate(parts) for parts in (earlier, later, weights))
    shape = (sequences.num_items, sequences.num_items)
    one_way = sp.csr_matrix((data, (rows, columns)), shape=shape)
    return (one_way + one_way.T).tocsr()
