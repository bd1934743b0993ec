"""Numberings: what they are, that they do not leak, and that a leak would be seen."""

import numpy as np
import pytest
from genrec_shards.keyed import keyed_permutation
from genrec_shards.numbering import Numbering, number
from genrec_shards.sequences import Sequences, sequences_from_ids
from hypothesis import given, settings
from hypothesis import strategies as st

LOG = sequences_from_ids(["a", "b", "c"], [4, 3, 5], ["5", "3", "9", "1", "3", "7", "9", "9", "5", "3", "8", "2"])


def test_given_repeats_the_ids():
    numbering = number(LOG, "given", seed=3)
    assert numbering.item_codes == LOG.item_ids
    assert numbering.user_codes == LOG.user_ids


def test_random_is_a_permutation_of_the_catalogue_under_the_seed():
    first, second, other = number(LOG, "random", 0), number(LOG, "random", 0), number(LOG, "random", 1)
    assert sorted(first.item_codes, key=int) == [str(n) for n in range(1, 8)]
    assert sorted(first.user_codes, key=int) == ["1", "2", "3"]
    assert first == second
    assert first.numbering_hash() == second.numbering_hash()
    assert first.numbering_hash() != other.numbering_hash()


def test_train_order_counts_training_parts_then_the_rest():
    numbering = number(LOG, "train-order", 0)
    code = dict(zip(LOG.item_ids, numbering.item_codes, strict=True))
    assert [code[item] for item in ("5", "3", "9")] == ["1", "2", "3"]  # training parts: 5 3 | 3 | 9 5 3
    assert sorted(code[item] for item in ("1", "2", "7", "8")) == ["4", "5", "6", "7"]
    assert len({tuple(number(LOG, "train-order", seed).item_codes) for seed in range(20)}) > 5


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="choose one of given, random, train-order"):
        number(LOG, "semantic", 0)  # type: ignore[arg-type]


def test_permutations_are_whole_and_even():
    for size in (0, 1, 2, 3, 1000, 1025):
        assert sorted(keyed_permutation(size, 7).tolist()) == list(range(size))
    places = np.stack([keyed_permutation(5, seed) for seed in range(4000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in places.T])
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def first_appearance(sequences: Sequences) -> list[str]:
    """The standard files' numbering: by first appearance, held-out items included. It leaks."""
    _, first = np.unique(sequences.items, return_index=True)
    return [str(place + 1) for place in np.argsort(np.argsort(first)).tolist()]


@st.composite
def log_and_changed_log(draw) -> tuple[Sequences, Sequences]:
    """Two logs over one catalogue that differ only in held-out items."""
    num_items = draw(st.integers(3, 12))
    lengths = draw(st.lists(st.integers(3, 7), min_size=1, max_size=8))
    items = st.integers(0, num_items - 1)
    total, offsets = sum(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.array(draw(st.lists(items, min_size=total, max_size=total)), dtype=np.int32)
    changed = rows.copy()
    for end in offsets[1:]:
        changed[end - 2 : end] = draw(st.lists(items, min_size=2, max_size=2))
    users, ids = [f"u{n}" for n in range(len(lengths))], [f"i{n:02}" for n in range(num_items)]
    return Sequences(rows, offsets, users, ids), Sequences(changed, offsets, users, ids)


@given(log_and_changed_log(), st.sampled_from(["random", "train-order"]), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_held_out_items_change_no_code(logs, name, seed):
    before, after = (number(log, name, seed) for log in logs)
    assert before == after
    assert before.numbering_hash() == after.numbering_hash()


def test_the_property_sees_a_leaking_numbering():
    @given(log_and_changed_log())
    @settings(max_examples=500, deadline=None, database=None)
    def leak(logs):
        before, after = (Numbering("given", 0, first_appearance(log), log.user_ids) for log in logs)
        assert before == after

    with pytest.raises(AssertionError):
        leak()
