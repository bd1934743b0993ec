"""Numberings: what they are, that they do not leak, and that a leak would be seen."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.item_vectors import TrainedVectors
from genrec_shards.numbering.numbering import Numbering, default_levels, number, summary
from genrec_shards.sequences import Sequences, sequences_from_ids
from genrec_shards.synthetic import make_process
from hypothesis import given, settings
from hypothesis import strategies as st

ITEMS = ["5", "3", "9", "1", "3", "7", "9", "9", "5", "3", "8", "2"]
LOG = sequences_from_ids(["a", "b", "c"], [4, 3, 5], ITEMS)


def vectors(values: np.ndarray) -> TrainedVectors:
    return TrainedVectors(values, "v.safetensors", "0" * 64, "n-2")


def texts(values: list[str]) -> Descriptions:
    return Descriptions(values, "meta.csv", "0" * 64)


def test_given_repeats_the_ids():
    numbering = number(LOG, "given", seed=3)
    assert numbering.item_codes == LOG.item_ids
    assert numbering.user_codes == LOG.user_ids


def test_random_is_a_permutation_of_the_catalogue_under_the_seed():
    first, second, other = (number(LOG, "random", seed) for seed in (0, 0, 1))
    assert sorted(first.item_codes, key=int) == [str(n) for n in range(1, 8)]
    assert sorted(first.user_codes, key=int) == ["1", "2", "3"]
    assert first == second
    assert first.numbering_hash() == second.numbering_hash()
    assert first.numbering_hash() != other.numbering_hash()


def test_train_order_counts_training_parts_then_the_rest():
    numbering = number(LOG, "train-order", 0)
    code = dict(zip(LOG.item_ids, numbering.item_codes, strict=True))
    # Training parts: 5 3 | 3 | 9 5 3.
    assert [code[item] for item in ("5", "3", "9")] == ["1", "2", "3"]
    assert sorted(code[item] for item in ("1", "2", "7", "8")) == ["4", "5", "6", "7"]
    assert len({tuple(number(LOG, "train-order", seed).item_codes) for seed in range(20)}) > 5


def test_keyed_permutations_are_whole_and_even():
    for size in (0, 1, 2, 3, 1000, 1025):
        assert sorted(keyed_permutation(size, 7).tolist()) == list(range(size))
    places = np.stack([keyed_permutation(5, seed) for seed in range(4000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in places.T])
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


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


def numbered(sequences: Sequences, name: str, seed: int) -> Numbering:
    """By any numbering but `given`: `vectors` is collaborative by trained vectors; texts and
    vectors are of the catalogue."""
    dice, num_items = np.random.default_rng([5, sequences.num_items]), sequences.num_items
    if name == "vectors":
        trained = vectors(dice.normal(size=(num_items, 4)))
        return number(sequences, "collaborative", seed, vectors=trained, levels=[3, 2])
    if name in ("semantic", "combined"):
        words = [" ".join(dice.choice(["red", "blue", "soap"], 2)) for _ in range(num_items)]
        return number(sequences, name, seed, descriptions=texts(words))
    return number(sequences, name, seed)  # type: ignore[arg-type]


LEAK_FREE = ["random", "train-order", "collaborative", "vectors", "semantic", "combined"]


@given(log_and_changed_log(), st.sampled_from(LEAK_FREE), st.integers(0, 3))
@settings(max_examples=250, deadline=None)
def test_held_out_items_change_no_code(logs, name, seed):
    before, after = (numbered(log, name, seed) for log in logs)
    assert before == after
    assert before.numbering_hash() == after.numbering_hash()
    assert len(set(before.item_codes)) == logs[0].num_items
    assert sorted(before.user_codes, key=int) == [str(n + 1) for n in range(logs[0].num_users)]


def test_leak_property_sees_a_leaking_numbering():
    def first_appearance(sequences: Sequences) -> list[str]:
        """The standard files' numbering: held-out items included. It leaks."""
        _, first = np.unique(sequences.items, return_index=True)
        return [str(place + 1) for place in np.argsort(np.argsort(first)).tolist()]

    @given(log_and_changed_log())
    @settings(max_examples=500, deadline=None, database=None)
    def leak(logs):
        before, after = map(first_appearance, logs)
        assert before == after

    with pytest.raises(AssertionError):
        leak()


# Hierarchical codes.

PROCESS = make_process(256, 16, seed=2)


@pytest.fixture(scope="module")
def planted() -> tuple[Sequences, np.ndarray]:
    """A log of hidden groups of items, and the group of each item row."""
    sequences = PROCESS.sample(1500, 6, 14)
    return sequences, PROCESS.group_of[[int(item) - 1 for item in sequences.item_ids]]


def first_levels(codes: list[str]) -> np.ndarray:
    return np.array([code.split("-")[0] for code in codes])


def share_of_alike_pairs(numbering: Numbering, group: np.ndarray) -> tuple[float, float]:
    """How many pairs of one group begin alike, and how many of all pairs do."""
    first = first_levels(numbering.item_codes)
    pairs = np.array(list(combinations(range(len(first)), 2)))
    together = first[pairs[:, 0]] == first[pairs[:, 1]]
    return together[group[pairs[:, 0]] == group[pairs[:, 1]]].mean(), together.mean()


def test_items_of_one_hidden_group_begin_alike(planted):
    sequences, group = planted
    made = number(sequences, "collaborative", 0, levels=[16])
    alike, chance = share_of_alike_pairs(made, group)
    assert chance < 0.07
    assert alike > 3 * chance
    alike, chance = share_of_alike_pairs(number(sequences, "random", 0), group)
    assert alike < 2 * chance + 1e-9


def test_direction_of_vectors_and_words_of_texts_decide_as_well(planted):
    sequences, group = planted
    rng, num_items = np.random.default_rng(0), sequences.num_items
    near = rng.normal(size=(16, 8))[group] + 0.2 * rng.normal(size=(num_items, 8))
    trained = vectors(near * rng.uniform(0.1, 9, (num_items, 1)))
    groups = enumerate(group.tolist())
    words = texts([f"Item {row} of the brand{one} (kind{one % 7})" for row, one in groups])
    for made in (
        number(sequences, "collaborative", 0, levels=[16], vectors=trained),
        number(sequences, "semantic", 0, levels=[16], descriptions=words),
        number(sequences, "combined", 0, levels=[16], descriptions=words),
    ):
        alike, chance = share_of_alike_pairs(made, group)
        assert alike > 8 * chance


def test_combined_codes_know_an_item_that_nobody_took_by_its_text(planted):
    sequences, _ = planted
    # The last user's two held-out items become ones that no training part holds.
    ids = [sequences.item_ids[row] for row in sequences.items]
    ids[-2:] = ["new", "newer"]
    users = np.diff(sequences.offsets)
    grown = sequences_from_ids(sequences.user_ids, users.tolist(), ids)
    words = texts([f"thing {row % 5}" for row in range(grown.num_items)])
    alone = number(grown, "collaborative", 0, levels=[4])
    made = number(grown, "combined", 0, levels=[4], descriptions=words)
    assert alone.hierarchy.placed_at_random == alone.hierarchy.unseen >= 2
    assert made.hierarchy.placed_at_random == 0
    assert (made.hierarchy.made_from, made.hierarchy.trained_through, made.hierarchy.window) == (
        "co-occurrence and text",
        "n-2",
        6,
    )


def test_codes_are_words_and_say_what_they_were_made_of(planted):
    sequences, _ = planted
    made = number(sequences, "collaborative", 3, levels=[5, 4])
    assert all(len(code.split("-")) == 3 for code in made.item_codes)
    assert set(first_levels(made.item_codes)) == {f"a{n}" for n in range(1, 6)}
    hierarchy = made.hierarchy
    assert (hierarchy.made_from, hierarchy.trained_through) == ("co-occurrence", "n-2")
    assert (hierarchy.levels, hierarchy.window) == ((5, 4), 6)
    assert made == number(sequences, "collaborative", 3, levels=[5, 4])
    assert made.item_codes != number(sequences, "collaborative", 4, levels=[5, 4]).item_codes
    lines = summary(made)
    assert "0 collisions; 0 items unseen in training, 0 placed at random" in lines[0]
    assert "5 beginnings of 49 to 52 items (median 52), entropy share 0.999" in lines[1]
    assert "20 beginnings of " in lines[2]
    assert "256 beginnings of 1 to 1 items (median 1), entropy share 1.0000" in lines[3]
    assert summary(number(sequences, "random", 3)) == []


def test_most_taken_item_of_a_leaf_comes_first(planted):
    sequences, _ = planted
    made = number(sequences, "collaborative", 0, levels=[8])
    taken = np.zeros(sequences.num_items, np.int64)
    for start, end in pairwise(sequences.offsets.tolist()):
        np.add.at(taken, sequences.items[start : end - 2], 1)
    leaves: dict[str, list[tuple[int, int]]] = {}
    for code, count in zip(made.item_codes, taken.tolist(), strict=True):
        leaf, place = code.split("-")
        leaves.setdefault(leaf, []).append((int(place[1:]), count))
    for leaf in leaves.values():
        counts = [count for _, count in sorted(leaf)]
        assert counts == sorted(counts, reverse=True)


def test_unseen_items_are_counted_and_spread():
    ids = [f"x{n}" for n in range(40)]
    logs = [[*ids[k : k + 4], f"new{2 * k}", f"new{2 * k + 1}"] for k in range(36)]
    flat = [item for user in logs for item in user]
    sequences = sequences_from_ids([f"u{k}" for k in range(36)], [6] * 36, flat)
    made = number(sequences, "collaborative", 0, levels=[7])
    unseen = np.array([item.startswith("new") for item in sequences.item_ids])
    assert made.hierarchy.unseen == made.hierarchy.placed_at_random == unseen.sum() == 72
    per_branch = np.unique(first_levels(made.item_codes)[unseen], return_counts=True)[1]
    assert len(per_branch) == 7
    assert per_branch.max() - per_branch.min() <= 2
    # What an untrained row holds decides nothing.
    ones = vectors(np.ones((sequences.num_items, 4)))
    by_vectors = number(sequences, "collaborative", 0, levels=[7], vectors=ones)
    assert by_vectors.hierarchy.placed_at_random == 72


@pytest.mark.parametrize("num_items", [3, 4, 9])
@pytest.mark.parametrize("levels", [None, [64, 64], [1], [2, 2, 2]])
def test_tiny_catalogue_has_codes(num_items, levels):
    sequences = sequences_from_ids(["u"], [num_items], [str(n) for n in range(num_items)])
    assert len(set(number(sequences, "collaborative", 0, levels=levels).item_codes)) == num_items


def test_default_levels_leave_about_three_items_in_a_leaf():
    assert default_levels(12_101) == (64, 64)  # Beauty
    assert default_levels(18_357) == (78, 78)  # Sports
    assert default_levels(3) == (1, 1)
    assert default_levels(196_608) == (256, 256)
    assert default_levels(10**6) == (69, 69, 69)


COLLABORATIVE, RANDOM = "collaborative", "random"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("magic", {}, "choose one of given, random, train-order, collaborative, semantic"),
        (RANDOM, {"levels": [4]}, "levels with numbering random: only collaborative, semantic and"),
        (COLLABORATIVE, {"levels": []}, "none: give 1 to 25 whole numbers above 0, as 64,64"),
        (COLLABORATIVE, {"levels": [8, 0]}, "levels 8,0: give"),
        (COLLABORATIVE, {"levels": [2] * 26}, "give 1 to 25"),
        ("combined", {}, "numbering combined needs the items' text"),
        ("semantic", {}, "needs the items' text or attributes: give --items META"),
        (
            COLLABORATIVE,
            {"descriptions": texts(["x"] * 7)},
            "only semantic and combined codes are made of text",
        ),
        (RANDOM, {"vectors": vectors(np.ones((7, 2)))}, "only collaborative codes"),
    ],
)
def test_what_does_not_go_together_is_refused(name, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        number(LOG, name, 0, **more)
    assert "\n" not in str(caught.value)
