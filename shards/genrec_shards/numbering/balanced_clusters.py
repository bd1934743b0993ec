"""Balanced clusters of clusters: each item's place in a tree whose branches are about equally
full."""

# N items, n of them with a vector, K clusters, D dims

import heapq
from collections.abc import Sequence

import numpy as np

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
    """Each item's branch (from 0) at each level, then its number in its leaf. All rows differ.

    Equal items go in a seeded order, never in that of the rows, which follow the ids.

    Args:
        vectors: float64[N, D]; only directions count. Of an item whose row is zeros nothing is
            known: it goes to a place of a seeded order where there is most room.
        counts: [N], how often an item is taken; a leaf's items are numbered from the most taken on.
        levels: clusters at each level.
        seed: of every order.

    Returns:
        int64[N, len(levels) + 1].
    """
    order = keyed_permutation(len(vectors), seed, _ORDER_STREAM)
    points, counts = vectors[order], counts[order]
    lengths = np.sqrt((points * points).sum(axis=1))[:, None]
    points = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
    known = (points != 0).any(axis=1)
    places = np.zeros((len(vectors), len(levels) + 1), dtype=np.int64)
    groups = [np.arange(len(vectors))]
    for level, num_clusters in enumerate(levels):
        parts = []
        for number, group in enumerate(groups):
            # Clusters of the known points, the others one by one where there are fewest: no branch
            # stays empty.
            wanted = min(num_clusters, len(group))
            key = mixed_key(seed, _CENTRE_STREAM, level, number)
            branch, is_known = np.empty(len(group), dtype=np.int64), known[group]
            branch[is_known] = balanced_clusters(points[group[is_known]], wanted, key)
            sizes = np.bincount(branch[is_known], minlength=wanted)
            branch[~is_known] = emptiest_first(sizes, int((~is_known).sum()))
            places[group, level] = branch
            by_branch = group[np.argsort(branch, kind="stable")]
            parts += np.split(by_branch, np.cumsum(np.bincount(branch))[:-1])
        groups = parts
    for group in groups:
        places[group[np.argsort(-counts[group], kind="stable")], -1] = np.arange(len(group))
    placed = np.empty_like(places)
    placed[order] = places
    return placed


def emptiest_first(sizes: np.ndarray, count: int) -> list[int]:
    """The bin of each of `count` things that go, one by one, where there are fewest; of equally
    full bins the first. Sizes 2, 0, 1: bins 1, 1, 2, 0, ..."""
    room = [(size, number) for number, size in enumerate(sizes.tolist())]
    heapq.heapify(room)
    chosen = []
    for _ in range(count):
        size, number = room[0]
        chosen.append(number)
        heapq.heapreplace(room, (size + 1, number))
    return chosen


def balanced_clusters(points: np.ndarray, num_clusters: int, key: int) -> np.ndarray:
    """int64[n], the cluster of each point (float64[n, D]); none holds more than ceil(n /
    num_clusters).

    k-means whose assignment is `balanced_assignment`; first centres as in k-means++, drawn under
    the key."""
    import scipy.sparse as sp
    from scipy.spatial.distance import cdist

    if len(points) <= num_clusters:
        return np.arange(len(points))
    capacity = -(-len(points) // num_clusters)
    # The first centres: points drawn one after another, each with a chance in proportion to its
    # squared distance to those drawn before.
    bits = keyed_bits(key, np.arange(num_clusters)) >> np.uint64(11)
    draws = bits.astype(np.float64) * 2.0**-53
    chosen = [int(draws[0] * len(points))]
    distances = np.full(len(points), np.inf)
    for draw in draws[1:]:
        distances = np.minimum(distances, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
        sums = np.cumsum(distances)
        # Where all points are on a centre any is as good: the search gives the first.
        place = int(np.searchsorted(sums, draw * sums[-1], side="right"))
        chosen.append(min(place, len(points) - 1))
    centres = points[chosen]
    labels = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        before = labels
        labels = balanced_assignment(cdist(points, centres, "sqeuclidean"), capacity)
        if np.array_equal(before, labels):
            break
        # The mean of each cluster's points; an empty cluster keeps its centre.
        sizes = np.bincount(labels, minlength=num_clusters)[:, None]
        members = (np.ones(len(points)), (labels, np.arange(len(points))))
        members_Kn = sp.csr_matrix(members, shape=(num_clusters, len(points)))
        centres = np.where(sizes > 0, (members_Kn @ points) / np.maximum(sizes, 1), centres)
    return labels


def balanced_assignment(costs_NK: np.ndarray, capacity: int) -> np.ndarray:
    """int64[N], a column for each row, none more than `capacity` times, at nearly the least total
    cost.

    An auction (Bertsekas and Castanon, 1989): a row without a place bids for the column that costs
    it least, prices included, as much as keeps it the cheapest; a full column keeps its highest
    bids, and the lowest of them is its price. Of equal bids the lower row's is kept. The total is
    above the least possible by N steps of _STEP at most."""
    # Costs [[0, 9], [0, 4], [0, 1]], capacity 2: all three rows bid for column 0, 9, 4 and 1 (and a
    # step) above its price 0; it keeps rows 0 and 1 and now costs 4. Row 2 waits, finds 0 + 4
    # against 1 + 0, and takes column 1.
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
        rows, wanted = np.arange(len(waiting)), net.argmin(axis=1)
        least = net[rows, wanted]
        net[rows, wanted] = np.inf
        bids[waiting] = prices[wanted] + (net.min(axis=1) - least) + step
        by_column = np.argsort(wanted, kind="stable")
        columns, firsts = np.unique(wanted[by_column], return_index=True)
        bidders = np.split(waiting[by_column], firsts[1:])
        outbid = []
        for column, new in zip(columns.tolist(), bidders, strict=True):
            rows = np.sort(np.concatenate([members[column], new]))
            if len(rows) >= capacity:
                rows = rows[np.argsort(-bids[rows], kind="stable")]
                prices[column] = bids[rows[capacity - 1]]
                outbid.append(rows[capacity:])
            members[column] = rows[:capacity]
        waiting = np.sort(np.concatenate([*outbid, np.zeros(0, np.int64)]))
    owner = np.empty(num_rows, dtype=np.int64)
    sizes = [len(rows) for rows in members]
    owner[np.concatenate(members)] = np.repeat(np.arange(num_columns), sizes)
    return owner
