"""Balanced clusters of clusters: each item's place in a tree whose branches are about equally
full."""

# N items, n of them with a vector, K clusters, D dims

import heapq
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from genrec_shards.keyed_random import keyed_bits, keyed_permutation, mixed_key

_ORDER_STREAM, _CENTRE_STREAM = 12, 13
_ROUNDS = 15
"""Most times that centres are moved."""
_STEP = 1 / 500
"""By which share of the largest cost a bid goes up at least: no item is farther from the best
balance than that."""


def places_in_tree(
    vectors: np.ndarray, counts: np.ndarray, levels: Sequence[int], seed: int
) -> np.ndarray:
    """int64[N, len(levels) + 1]: each item's branch (from 0) at each level, then its number in its
    leaf. All rows differ.

    `vectors`: float64[N, D]; only directions count. A row of zeros says that nothing is known of
    the item: it goes to a place of a seeded order where there is most room. `counts`: [N], how
    often an item is taken; a leaf's items are numbered from the most taken on. Equal items go in a
    seeded order, never in that of the rows, which follow the ids."""
    order = keyed_permutation(len(vectors), seed, _ORDER_STREAM)
    points, counts = _unit(vectors[order]), counts[order]
    known = (points != 0).any(axis=1)
    places = np.zeros((len(vectors), len(levels) + 1), dtype=np.int64)
    groups = [np.arange(len(vectors))]
    for level, num_clusters in enumerate(levels):
        parts = []
        for number, group in enumerate(groups):
            branch = _branches(
                points[group],
                known[group],
                num_clusters,
                mixed_key(seed, _CENTRE_STREAM, level, number),
            )
            places[group, level] = branch
            by_branch = group[np.argsort(branch, kind="stable")]
            parts += np.split(by_branch, np.cumsum(np.bincount(branch))[:-1])
        groups = parts
    for group in groups:
        places[group[np.argsort(-counts[group], kind="stable")], -1] = np.arange(len(group))
    placed = np.empty_like(places)
    placed[order] = places
    return placed


def balanced_clusters(points: np.ndarray, num_clusters: int, key: int) -> np.ndarray:
    """int64[n], the cluster of each point (float64[n, D]); none holds more than ceil(n /
    num_clusters).

    k-means whose assignment is `balanced_assignment`; first centres as in k-means++, drawn under
    the key."""
    if len(points) <= num_clusters:
        return np.arange(len(points))
    capacity = -(-len(points) // num_clusters)
    centres = _first_centres(points, num_clusters, key)
    labels = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        before, labels = (
            labels,
            balanced_assignment(cdist(points, centres, "sqeuclidean"), capacity),
        )
        if np.array_equal(before, labels):
            break
        centres = _means(points, labels, centres)
    return labels


def balanced_assignment(costs_NK: np.ndarray, capacity: int) -> np.ndarray:
    """int64[N], a column for each row, none more than `capacity` times, at nearly the least total
    cost.

    An auction (Bertsekas and Castanon, 1989): a row without a place bids for the column that costs
    it least, prices included, as much as keeps it the cheapest; a full column keeps its highest
    bids, and the lowest of them is its price. Of equal bids the lower row's is kept. The total is
    above the least possible by N steps of _STEP at most."""
    num_rows, num_columns = costs_NK.shape
    assert num_rows <= capacity * num_columns
    if num_columns == 1:
        return np.zeros(num_rows, dtype=np.int64)
    step = max(float(costs_NK.max(initial=0)), 1e-300) * _STEP
    prices, bids = np.zeros(num_columns), np.zeros(num_rows)
    members = [np.zeros(0, np.int64)] * num_columns
    waiting = np.arange(num_rows)
    while waiting.size:
        net = costs_NK[waiting] + prices
        here, wanted = np.arange(len(waiting)), net.argmin(axis=1)
        least = net[here, wanted]
        net[here, wanted] = np.inf
        bids[waiting] = prices[wanted] + (net.min(axis=1) - least) + step
        by_column = np.argsort(wanted, kind="stable")
        columns, firsts = np.unique(wanted[by_column], return_index=True)
        lost = []
        for column, bidders in zip(
            columns.tolist(), np.split(waiting[by_column], firsts[1:]), strict=True
        ):
            rows = np.sort(np.concatenate([members[column], bidders]))
            if len(rows) >= capacity:
                rows = rows[np.argsort(-bids[rows], kind="stable")]
                prices[column] = bids[rows[capacity - 1]]
                lost.append(rows[capacity:])
            members[column] = rows[:capacity]
        waiting = np.sort(np.concatenate([*lost, np.zeros(0, np.int64)]))
    owner = np.empty(num_rows, dtype=np.int64)
    owner[np.concatenate(members)] = np.repeat(
        np.arange(num_columns), [len(rows) for rows in members]
    )
    return owner


def _branches(points: np.ndarray, known: np.ndarray, num_clusters: int, key: int) -> np.ndarray:
    """int64[N]: clusters of the known points, the others one by one where there are fewest; no
    branch stays empty."""
    num_clusters = min(num_clusters, len(points))
    branch = np.empty(len(points), dtype=np.int64)
    branch[known] = balanced_clusters(points[known], num_clusters, key)
    sizes = np.bincount(branch[known], minlength=num_clusters)
    room = [(size, cluster) for cluster, size in enumerate(sizes.tolist())]
    heapq.heapify(room)
    for row in np.flatnonzero(~known):
        size, cluster = room[0]
        branch[row] = cluster
        heapq.heapreplace(room, (size + 1, cluster))
    return branch


def _first_centres(points: np.ndarray, num_clusters: int, key: int) -> np.ndarray:
    """Points drawn one after another, each with a chance in proportion to its squared distance to
    those drawn before."""
    draws = (keyed_bits(key, np.arange(num_clusters)) >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53
    chosen = [int(draws[0] * len(points))]
    distances = np.full(len(points), np.inf)
    for draw in draws[1:]:
        distances = np.minimum(distances, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
        sums = np.cumsum(distances)
        # Where all points stand on a centre any is as good: the search gives the first.
        chosen.append(
            min(int(np.searchsorted(sums, draw * sums[-1], side="right")), len(points) - 1)
        )
    return points[chosen]


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean of each cluster's points; an empty cluster keeps its centre."""
    sizes = np.bincount(labels, minlength=len(centres))
    members = sp.csr_matrix(
        (np.ones(len(points)), (labels, np.arange(len(points)))), shape=(len(centres), len(points))
    )
    return np.where(sizes[:, None] > 0, (members @ points) / np.maximum(sizes, 1)[:, None], centres)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    lengths = np.sqrt((vectors * vectors).sum(axis=1))[:, None]
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
