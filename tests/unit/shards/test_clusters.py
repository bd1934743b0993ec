"""Balanced clusters: none is too full, the assignment is nearly the best, alike items share their
branches."""

import itertools

import numpy as np
import pytest
from genrec_shards.numbering.balanced_clusters import (
    balanced_assignment,
    balanced_clusters,
    places_in_tree,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment


@st.composite
def costs_and_capacity(draw):
    num_rows, num_columns = draw(st.integers(0, 30)), draw(st.integers(1, 7))
    size = num_rows * num_columns
    whole = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    scale = draw(st.sampled_from([0.0, 1e-9, 0.25, 1e6]))
    costs = np.array(whole, np.float64).reshape(num_rows, num_columns) * scale
    return costs, -(-num_rows // num_columns) + draw(st.integers(0, 2))


@given(costs_and_capacity())
@settings(max_examples=200, deadline=None)
def test_assignment_is_within_capacity_and_nearly_the_best(case):
    costs, capacity = case
    found = balanced_assignment(costs, capacity)
    assert np.bincount(found, minlength=costs.shape[1]).max(initial=0) <= capacity
    rows, slots = linear_sum_assignment(np.repeat(costs, capacity, axis=1))
    best = costs[rows, slots // max(capacity, 1)].sum()
    total = costs[np.arange(len(costs)), found].sum()
    worst = best + len(costs) * costs.max(initial=0) / 500 * (1 + 1e-6)
    assert best - 1e-9 * abs(best) <= total <= worst


def blobs(num_blobs: int, size: int, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Directions around `num_blobs` random ones, and which is whose, in mixed order."""
    rng = np.random.default_rng(4)
    middles = rng.normal(size=(num_blobs, 16))
    of = rng.permutation(np.repeat(np.arange(num_blobs), size))
    return middles[of] + noise * rng.normal(size=(len(of), 16)), of


def test_planted_clusters_are_found():
    points, of = blobs(8, 25)
    found = balanced_clusters(points, 8, key=1)
    assert np.bincount(found).tolist() == [25] * 8
    together = found[:, None] == found[None]
    alike = of[:, None] == of[None]
    assert together[alike].mean() > 0.85  # 0.125 by chance


@given(
    st.integers(0, 40),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 2),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_places_differ_and_branches_are_about_equally_full(num_items, levels, seed, data):
    def drawn(low: int, high: int, size: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))

    # Zeros and equals among them.
    vectors = drawn(-1, 1, 3 * num_items).astype(np.float64).reshape(num_items, 3)
    counts = drawn(0, 3, num_items).astype(np.int64)
    places = places_in_tree(vectors, counts, levels, seed)
    assert places.shape == (num_items, len(levels) + 1)
    assert len({tuple(row) for row in places.tolist()}) == num_items
    assert np.array_equal(places, places_in_tree(vectors, counts, levels, seed))
    limit, prefixes = num_items, [()] * num_items
    for level, num_clusters in enumerate(levels):
        limit = -(-limit // num_clusters)
        branches = places[:, level].tolist()
        prefixes = [(*prefix, one) for prefix, one in zip(prefixes, branches, strict=True)]
        assert places[:, level].max(initial=0) < num_clusters
        assert max((prefixes.count(prefix) for prefix in set(prefixes)), default=0) <= limit
    for leaf in set(prefixes):
        rows = [row for row, prefix in enumerate(prefixes) if prefix == leaf]
        rows.sort(key=lambda row: places[row, -1])
        assert [places[row, -1] for row in rows] == list(range(len(rows)))
        assert all(counts[a] >= counts[b] for a, b in itertools.pairwise(rows))


def test_items_of_which_nothing_is_known_are_spread_over_the_room():
    points, _ = blobs(8, 25)
    unknown = np.arange(0, 200, 4)
    points[unknown] = 0
    places = places_in_tree(points, np.ones(200, np.int64), [8, 5], seed=0)
    sizes = np.bincount(places[:, 0])
    assert (sizes.min(), sizes.max()) == (25, 25)
    assert len(set(places[unknown, 0].tolist())) == 8
    other = places_in_tree(points, np.ones(200, np.int64), [8, 5], seed=1)
    assert not np.array_equal(places[unknown], other[unknown])


def test_order_of_rows_gives_no_code_away():
    """Rows follow ids, and ids may tell when an item was first taken: among equal items rows must
    not matter."""
    places = places_in_tree(np.ones((300, 4)), np.ones(300, np.int64), [4], seed=0)
    order = np.lexsort(places.T[::-1])
    assert abs(np.corrcoef(order, np.arange(300))[0, 1]) < 0.25


def test_only_directions_count():
    points, _ = blobs(4, 10)
    scaled = points * np.random.default_rng(0).choice([0.25, 1.0, 4.0], size=(40, 1))
    found = (places_in_tree(one, np.ones(40, np.int64), [4, 3], 0) for one in (points, scaled))
    assert np.array_equal(*found)


@pytest.mark.parametrize("levels", [[64, 64], [1], [2, 64, 64]])
def test_three_items_and_fewer_items_than_clusters(levels):
    for num_items in (1, 2, 3):
        places = places_in_tree(np.eye(3)[:num_items], np.ones(num_items, np.int64), levels, 0)
        assert len({tuple(row) for row in places.tolist()}) == num_items
