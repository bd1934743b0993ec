"""Numberings: what they are, that they do not leak, and that a leak would be seen."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.item_vectors import TrainedVectors
from genrec_shards.numbering.numbering import Numbering, default_levels, number, told
from genrec_shards.sequences import Sequences, sequences_from_ids
from genrec_shards.synthetic import make_process
from hypothesis import given, settings
from hypothesis import strategies as st

LOG = sequences_from_ids(
    ["a", "b", "c"], [4, 3, 5], ["5", "3", "9", "1", "3", "7", "9", "9", "5", "3", "8", "2"]
)


def test_given_repeats_the_ids():
    numbering = number(LOG, "given", seed=3)
    assert numbering.item_codes == LOG.item_ids
    assert numbering.user_codes == LOG.user_ids


def test_random_is_a_permutation_of_the_catalogue_under_the_seed():
    first, second, other = (
        number(LOG, "random", 0),
        number(LOG, "random", 0),
        number(LOG, "random", 1),
    )
    assert sorted(first.item_codes, key=int) == [str(n) for n in range(1, 8)]
    assert sorted(first.user_codes, key=int) == ["1", "2", "3"]
    assert first == second
    assert first.numbering_hash() == second.numbering_hash()
    assert first.numbering_hash() != other.numbering_hash()


def test_train_order_counts_training_parts_then_the_rest():
    numbering = number(LOG, "train-order", 0)
    code = dict(zip(LOG.item_ids, numbering.item_codes, strict=True))
    assert [code[item] for item in ("5", "3", "9")] == [
        "1",
        "2",
        "3",
    ]  # training parts: 5 3 | 3 | 9 5 3
    assert sorted(code[item] for item in ("1", "2", "7", "8")) == ["4", "5", "6", "7"]
    assert len({tuple(number(LOG, "train-order", seed).item_codes) for seed in range(20)}) > 5


def test_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="choose one of given, random, train-order, collaborative, semantic"
    ):
        number(LOG, "magic", 0)  # type: ignore[arg-type]


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


def numbered(sequences: Sequences, name: str, seed: int) -> Numbering:
    """By any numbering but `given`: `vectors` is collaborative by trained vectors; texts and
    vectors are of the catalogue."""
    dice = np.random.default_rng([5, sequences.num_items])
    if name == "vectors":
        vectors = TrainedVectors(
            dice.normal(size=(sequences.num_items, 4)), "v.safetensors", "0" * 64, "n-2"
        )
        return number(sequences, "collaborative", seed, vectors=vectors, levels=[3, 2])
    if name == "semantic":
        texts = [
            " ".join(dice.choice(["red", "blue", "soap", "comb"], 2)) for _ in sequences.item_ids
        ]
        return number(
            sequences, "semantic", seed, descriptions=Descriptions(texts, "meta.csv", "0" * 64)
        )
    return number(sequences, name, seed)  # type: ignore[arg-type]


LEAK_FREE = ["random", "train-order", "collaborative", "vectors", "semantic"]


@given(log_and_changed_log(), st.sampled_from(LEAK_FREE), st.integers(0, 3))
@settings(max_examples=250, deadline=None)
def test_held_out_items_change_no_code(logs, name, seed):
    before, after = (numbered(log, name, seed) for log in logs)
    assert before == after
    assert before.numbering_hash() == after.numbering_hash()
    assert len(set(before.item_codes)) == logs[0].num_items
    assert sorted(before.user_codes, key=int) == [str(n + 1) for n in range(logs[0].num_users)]


def test_the_property_sees_a_leaking_numbering():
    @given(log_and_changed_log())
    @settings(max_examples=500, deadline=None, database=None)
    def leak(logs):
        before, after = (Numbering("given", 0, first_appearance(log), log.user_ids) for log in logs)
        assert before == after

    with pytest.raises(AssertionError):
        leak()


# Hierarchical codes.

PROCESS = make_process(256, 16, seed=2)


def planted() -> tuple[Sequences, np.ndarray]:
    """A log of hidden groups of items, and the group of each item row."""
    sequences = PROCESS.sample(1500, 6, 14)
    return sequences, PROCESS.group_of[[int(item) - 1 for item in sequences.item_ids]]


def beginnings(codes: list[str], levels: int) -> np.ndarray:
    return np.array(["-".join(code.split("-")[:levels]) for code in codes])


def share_of_alike_pairs(codes: list[str], group: np.ndarray) -> tuple[float, float]:
    """How many pairs of one group begin alike, and how many of all pairs do."""
    first = beginnings(codes, 1)
    pairs = np.array(list(combinations(range(len(codes)), 2)))
    together = first[pairs[:, 0]] == first[pairs[:, 1]]
    return together[group[pairs[:, 0]] == group[pairs[:, 1]]].mean(), together.mean()


def test_items_of_one_hidden_group_begin_alike():
    sequences, group = planted()
    alike, chance = share_of_alike_pairs(
        number(sequences, "collaborative", 0, levels=[16]).item_codes, group
    )
    assert chance < 0.07
    assert alike > 3 * chance
    alike, chance = share_of_alike_pairs(number(sequences, "random", 0).item_codes, group)
    assert alike < 2 * chance + 1e-9


def test_the_direction_of_trained_vectors_and_the_words_of_texts_decide_as_well():
    sequences, group = planted()
    rng = np.random.default_rng(0)
    near = rng.normal(size=(16, 8))[group] + 0.2 * rng.normal(size=(sequences.num_items, 8))
    vectors = TrainedVectors(
        near * rng.uniform(0.1, 9, (sequences.num_items, 1)), "v.safetensors", "ab", "n-2"
    )
    made = number(sequences, "collaborative", 0, levels=[16], vectors=vectors)
    alike, chance = share_of_alike_pairs(made.item_codes, group)
    assert alike > 8 * chance
    texts = [
        f"Item {row} of the brand{number} (kind{number % 7})"
        for row, number in enumerate(group.tolist())
    ]
    made = number(
        sequences, "semantic", 0, levels=[16], descriptions=Descriptions(texts, "meta.csv", "cd")
    )
    alike, chance = share_of_alike_pairs(made.item_codes, group)
    assert alike > 8 * chance


def test_codes_are_words_and_say_what_they_were_made_of():
    sequences, _ = planted()
    made = number(sequences, "collaborative", 3, levels=[5, 4])
    assert all(len(code.split("-")) == 3 for code in made.item_codes)
    assert {code[0] for code in made.item_codes} == {"a"}
    assert set(beginnings(made.item_codes, 1)) == {f"a{n}" for n in range(1, 6)}
    assert made.hierarchy is not None
    assert (made.hierarchy.made_from, made.hierarchy.levels, made.hierarchy.window) == (
        "co-occurrence",
        (5, 4),
        6,
    )
    assert made.hierarchy.trained_through == "n-2"
    assert made == number(sequences, "collaborative", 3, levels=[5, 4])
    assert made.item_codes != number(sequences, "collaborative", 4, levels=[5, 4]).item_codes
    lines = told(made)
    assert "0 collisions; 0 items unseen in training, 0 placed at random" in lines[0]
    assert "5 beginnings of 49 to 52 items (median 52), entropy share 0.999" in lines[1]
    assert "20 beginnings of " in lines[2]
    assert "256 beginnings of 1 to 1 items (median 1), entropy share 1.0000" in lines[3]
    assert told(number(sequences, "random", 3)) == []


def test_the_most_taken_item_of_a_leaf_comes_first():
    sequences, _ = planted()
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
    users = [[*ids[k : k + 4], f"new{2 * k}", f"new{2 * k + 1}"] for k in range(0, 36)]
    sequences = sequences_from_ids(
        [f"u{k}" for k in range(36)], [6] * 36, [item for user in users for item in user]
    )
    made = number(sequences, "collaborative", 0, levels=[7])
    assert made.hierarchy is not None
    unseen = np.array([item.startswith("new") for item in sequences.item_ids])
    assert made.hierarchy.unseen == unseen.sum() == 72
    assert made.hierarchy.placed_at_random == 72
    per_branch = np.unique(beginnings(made.item_codes, 1)[unseen], return_counts=True)[1]
    assert len(per_branch) == 7
    assert per_branch.max() - per_branch.min() <= 2
    vectors = TrainedVectors(np.ones((sequences.num_items, 4)), "v.safetensors", "ab", "n-2")
    by_vectors = number(sequences, "collaborative", 0, levels=[7], vectors=vectors)
    assert by_vectors.hierarchy is not None
    assert (
        by_vectors.hierarchy.placed_at_random == 72
    )  # what an untrained row holds decides nothing


@pytest.mark.parametrize("num_items", [3, 4, 9])
def test_a_tiny_catalogue_has_codes(num_items):
    ids = [str(n) for n in range(num_items)]
    sequences = sequences_from_ids(["u"], [num_items], ids)
    for levels in (None, [64, 64], [1], [2, 2, 2]):
        codes = number(sequences, "collaborative", 0, levels=levels).item_codes
        assert len(set(codes)) == num_items


def test_default_levels_leave_about_three_items_in_a_leaf():
    assert default_levels(12_101) == (64, 64)  # Beauty
    assert default_levels(18_357) == (78, 78)  # Sports
    assert default_levels(3) == (1, 1)
    assert default_levels(196_608) == (256, 256)
    assert default_levels(10**6) == (69, 69, 69)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "random",
            {"levels": [4]},
            "levels with numbering random: only collaborative and semantic",
        ),
        (
            "collaborative",
            {"levels": []},
            "levels none: give 1 to 25 whole numbers above 0, as 64,64",
        ),
        ("collaborative", {"levels": [8, 0]}, "levels 8,0: give"),
        ("collaborative", {"levels": [2] * 26}, "give 1 to 25"),
        ("semantic", {}, "needs the items' text or attributes: give --items META"),
        (
            "collaborative",
            {"descriptions": Descriptions(["x"] * 7, "m", "0")},
            "only semantic codes are made of text",
        ),
        (
            "random",
            {"vectors": TrainedVectors(np.ones((7, 2)), "v", "0", "n-2")},
            "only collaborative codes",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(name, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        number(LOG, name, 0, **more)
    assert "\n" not in str(caught.value)
