"""Mask strategies: their laws, and that a mask is a function of (seed, epoch, sample) alone."""

from functools import partial

import numpy as np
import pytest
from genrec_shards.keyed_random import keyed_uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from genrec_dist.config.recipe import Mask
from genrec_dist.data.samples.masking import STRATEGIES, Targets

NAMES = sorted(STRATEGIES)
MANY = 60_000


def choose(name: str, lengths, sample_ids=None, seed=0, epoch=0, **knobs) -> Targets:
    lengths = np.asarray(lengths, np.int64)
    ids = np.arange(len(lengths)) if sample_ids is None else np.asarray(sample_ids)
    return STRATEGIES[name](lengths, partial(keyed_uniform, seed, epoch, ids), Mask(name, **knobs))


def fits(counts, probabilities) -> bool:
    """Chi-square at one in a million; the draws are keyed, so the verdict never changes."""
    expected = np.asarray(probabilities) * np.sum(counts)
    if len(expected) == 1:
        return True  # one outcome; the callers check that no other one comes
    return chisquare(counts, expected).pvalue > 1e-6


@given(
    name=st.sampled_from(NAMES),
    lengths=st.lists(st.integers(1, 40) | st.integers(1000, 100_000), min_size=1, max_size=30),
    k=st.integers(1, 9),
    p=st.floats(1e-3, 1),
    seed=st.integers(0, 2**62),
)
@settings(max_examples=150, deadline=None)
def test_positions_are_in_range_ascending_and_padded_on_the_right(name, lengths, k, p, seed):
    targets = choose(name, lengths, seed=seed, k=k, p=p).positions_BK
    assert targets.dtype == np.int64
    for row, length in zip(targets, lengths, strict=True):
        count = int((row >= 0).sum())
        assert 1 <= count <= max(k, 1)
        assert (row[count:] == -1).all()
        assert (np.diff(row[:count]) > 0).all()
        assert row[count - 1] < length


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_is_a_function_of_seed_epoch_and_sample_alone(name):
    rng = np.random.default_rng(0)
    lengths, ids = rng.integers(1, 30, 400), rng.permutation(10_000)[:400]

    def positions(rows=slice(None), shift=0, **key) -> np.ndarray:
        key = {"seed": 3, "epoch": 2, **key}
        return choose(name, lengths[rows], ids[rows] + shift, **key).positions_BK

    whole, order = positions(), rng.permutation(400)
    assert np.array_equal(whole, positions())
    assert np.array_equal(whole[order], positions(order))
    alone = [positions(slice(row, row + 1))[0] for row in range(50)]
    assert np.array_equal(whole[:50], alone)
    for other in ({"seed": 4}, {"epoch": 1}, {"shift": 10_000}):
        assert (positions(**other) != whole).any(axis=1).mean() > 0.3


@pytest.mark.parametrize("length", [1, 2, 7])
def test_single_is_uniform(length):
    targets = choose("single", np.full(MANY, length))
    assert targets.positions_BK.shape == (MANY, 1)
    assert not targets.together
    counts = np.bincount(targets.positions_BK[:, 0], minlength=length)
    assert len(counts) == length
    assert fits(counts, np.full(length, 1 / length))


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_last_biased_takes_the_last_with_probability_p_and_else_any(p):
    positions = choose("last-biased", np.full(MANY, 6), p=p).positions_BK[:, 0]
    counts = np.bincount(positions, minlength=6)
    if p == 1.0:
        assert counts[5] == MANY
        return
    assert fits(counts, np.full(6, (1 - p) / 6) + np.eye(6)[5] * p)


@pytest.mark.parametrize("p", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 3, 12])
def test_recency_is_the_truncated_geometric_law(p, length):
    positions = choose("recency", np.full(MANY, length), p=p).positions_BK[:, 0]
    weights = (1 - p) ** np.arange(length)[::-1]
    counts = np.bincount(positions, minlength=length)
    possible = weights > 0
    assert len(counts) == length
    assert (counts[~possible] == 0).all()
    assert fits(counts[possible], (weights / weights.sum())[possible])


def test_span_is_neighbours_of_uniform_width_at_a_uniform_place_generated_together():
    targets = choose("span", np.full(MANY, 7), k=3)
    assert targets.together
    widths = (targets.positions_BK >= 0).sum(axis=1)
    assert fits(np.bincount(widths, minlength=4)[1:], np.full(3, 1 / 3))
    for width in (1, 2, 3):
        rows = targets.positions_BK[widths == width, :width]
        assert (np.diff(rows, axis=1) == 1).all()
        counts = np.bincount(rows[:, 0], minlength=8 - width)
        assert fits(counts, np.full(8 - width, 1 / (8 - width)))
    # A span is no wider than its sequence.
    widths = (choose("span", np.full(5000, 2), k=9).positions_BK >= 0).sum(axis=1)
    assert fits(np.bincount(widths, minlength=3)[1:], [0.5, 0.5])


@pytest.mark.parametrize(
    ("length", "k", "count"), [(1, 4, 1), (2, 4, 1), (3, 4, 1), (4, 4, 2), (8, 4, 4), (50, 4, 4)]
)
def test_multi_masks_up_to_k_and_at_most_half(length, k, count):
    targets = choose("multi", np.full(500, length), k=k)
    assert not targets.together
    assert ((targets.positions_BK >= 0).sum(axis=1) == count).all()


@pytest.mark.parametrize(("length", "k"), [(4, 2), (5, 2), (6, 3), (7, 9)])
def test_multi_takes_every_subset_equally_often(length, k):
    chosen = choose("multi", np.full(MANY, length), k=k).positions_BK
    count = min(k, length // 2)
    subsets, counts = np.unique(chosen[:, :count], axis=0, return_counts=True)
    num_subsets = {(4, 2): 6, (5, 2): 10, (6, 3): 20, (7, 9): 35}[length, k]
    assert len(subsets) == num_subsets
    assert fits(counts, np.full(num_subsets, 1 / num_subsets))


def test_multi_in_a_mixed_batch_is_as_it_is_alone():
    lengths = np.tile([1, 2, 5, 9, 30], 200)
    mixed = choose("multi", lengths, k=4).positions_BK
    for length in (1, 2, 5, 9, 30):
        here = np.flatnonzero(lengths == length)
        assert np.array_equal(mixed[here], choose("multi", lengths[here], here, k=4).positions_BK)
