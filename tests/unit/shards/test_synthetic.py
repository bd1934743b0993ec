"""The demo's catalogue: exact conditionals, an oracle that is a ceiling, pairs needed to reach
it."""

import time

import numpy as np
import pytest
from genrec_shards.histories import histories, training_part
from genrec_shards.sequences import (
    Sequences,
    read_sequences,
    sequences_from_ids,
    write_sequences,
)
from genrec_shards.synthetic import Process, make_process


@pytest.fixture(scope="module")
def process() -> Process:
    return make_process()


@pytest.fixture(scope="module")
def sequences(process) -> Sequences:
    return process.sample(6000, 8, 20)


def numbers_of(sequences: Sequences) -> np.ndarray:
    """The process's item number of each item row."""
    return np.array([int(item) - 1 for item in sequences.item_ids])


def next_item_probabilities(process: Process, history: np.ndarray) -> np.ndarray:
    """float64[N], the exact distribution of the next item after `history`, int[L] item numbers
    0..N-1 (id - 1)."""
    history = np.asarray(history, dtype=np.int64)
    probabilities = process._item_probabilities(process.group_of[history[-2:]])
    probabilities[history] = 0
    return probabilities / probabilities.sum()


def hit_rate(lists: np.ndarray, targets: np.ndarray) -> float:
    return float((lists[:, :10] == targets[:, None]).any(axis=1).mean())


def test_shape_of_the_sample(process, sequences):
    assert (sequences.num_users, process.num_items) == (6000, 1024)
    assert sequences.num_items >= 1000
    assert (sequences.lengths.min(), sequences.lengths.max()) == (8, 20)
    assert abs(sequences.lengths.mean() - 14) < 0.2
    # No user takes an item twice.
    users = np.repeat(np.arange(sequences.num_users), sequences.lengths)
    pairs = users * sequences.num_items + sequences.items
    assert len(np.unique(pairs)) == sequences.num_interactions


def test_seeds_decide_and_nothing_else():
    def hash_of(seed: int, sample_seed: int = 0) -> str:
        return make_process(64, 8, seed=seed).sample(50, 3, 6, seed=sample_seed).sequences_hash()

    assert hash_of(0) == hash_of(0)
    assert len({hash_of(0), hash_of(1), hash_of(0, 1), hash_of(1, 1)}) == 4


def test_ids_tell_nothing_of_the_groups(process):
    assert np.abs(np.corrcoef(np.arange(process.num_items), process.group_of)[0, 1]) < 0.1
    assert (process.group_of[1:] == process.group_of[:-1]).mean() < 0.08  # 1/32 by chance


@pytest.mark.parametrize("length", [0, 1, 2, 5, 20])
def test_probabilities_sum_to_one_over_new_items(process, length):
    history = np.random.default_rng(length).permutation(process.num_items)[:length]
    probabilities = next_item_probabilities(process, history)
    assert probabilities.shape == (process.num_items,)
    assert abs(probabilities.sum() - 1) < 1e-12
    assert (probabilities[history] == 0).all()
    assert (np.delete(probabilities, history) > 0).all()


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """In units of its standard deviation above its mean; cells with few cases are joined."""
    few = expected < 5
    observed = np.append(observed[~few], observed[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    cells = expected > 0
    statistic = ((observed[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_frequencies_agree_with_the_exact_conditionals(length):
    """The last of `length` items against its distribution given the others, by item and by place in
    the ranking."""
    process = make_process(64, 8, seed=3, num_classes=3)
    num_users, size = 6000, max(length, 3)
    drawn = process.sample(num_users, size, size)
    items = numbers_of(drawn)[drawn.items].reshape(num_users, size)
    probabilities = np.stack([next_item_probabilities(process, row[: length - 1]) for row in items])
    targets = items[:, length - 1]
    by_item = chi_square(np.bincount(targets, minlength=64), probabilities.sum(axis=0))
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    ranks = np.argmax(ranking == targets[:, None], axis=1)
    expected = np.sort(probabilities, axis=1)[:, ::-1].sum(axis=0)
    by_rank = chi_square(np.bincount(ranks, minlength=64), expected)
    assert abs(by_item) < 5
    assert abs(by_rank) < 5


@pytest.mark.parametrize("split", ["validation", "test"])
def test_oracle_ranks_by_exact_probability(process, split):
    few = process.sample(200, 3, 9, seed=5)
    past, numbers = histories(few, split), numbers_of(few)
    lists = process.oracle_lists(few, split)
    assert (lists.shape, lists.dtype) == ((200, 20), np.int32)
    for user in range(few.num_users):
        history = past.items[past.offsets[user] : past.offsets[user + 1]]
        exact = next_item_probabilities(process, numbers[history])[numbers]
        exact[history] = -1
        assert np.allclose(exact[lists[user]], -np.sort(-exact)[:20], rtol=1e-12, atol=0)
        assert not set(lists[user]) & set(history)
        assert len(set(lists[user])) == 20


def test_oracles_hit_rate_is_the_mass_of_its_list_and_a_counter_stays_far_below(process, sequences):
    past, numbers = histories(sequences, "test"), numbers_of(sequences)
    started = time.perf_counter()
    lists = process.oracle_lists(sequences, "test")
    assert time.perf_counter() - started < 5
    users, masses = np.arange(0, 6000, 4), []
    for user in users:
        history = numbers[past.items[past.offsets[user] : past.offsets[user + 1]]]
        exact = next_item_probabilities(process, history)
        masses.append(exact[numbers[lists[user, :10]]].sum())
    error = 0.5 / np.sqrt(len(users))
    assert abs(hit_rate(lists[users], past.targets_U[users]) - np.mean(masses)) < 4 * error
    ceiling = hit_rate(lists, past.targets_U)
    assert 0.6 < ceiling < 0.8
    # What followed the last item most often in the training parts, history excluded.
    part = training_part(sequences, "test", "n-2")
    follows = part.users[1:] == part.users[:-1]
    counts = np.zeros((sequences.num_items, sequences.num_items))
    np.add.at(counts, (part.items[:-1][follows], part.items[1:][follows]), 1)
    scores = counts[past.items[past.offsets[1:] - 1]]
    scores[past.users, past.items] = -1
    counter = hit_rate(np.argsort(-scores, axis=1, kind="stable"), past.targets_U)
    assert 0.2 < counter < 0.65 * ceiling


def test_oracle_knows_sequences_that_went_through_a_file(process, sequences, tmp_path):
    write_sequences(sequences, tmp_path / "log.txt.gz")
    again = read_sequences(tmp_path / "log.txt.gz")
    assert again.sequences_hash() == sequences.sequences_hash()
    # Most of the catalogue is missing: rows are not the process's numbers.
    few = process.sample(30, 3, 5)
    write_sequences(few, tmp_path / "few.txt")
    lists = process.oracle_lists(read_sequences(tmp_path / "few.txt"), "test")
    assert lists.max() < few.num_items
    foreign = sequences_from_ids(["u"], [3], ["1", "2", "x"])
    with pytest.raises(ValueError, match="item 'x' is none of"):
        process.oracle_lists(foreign, "test")


@pytest.mark.parametrize(
    ("sizes", "more"),
    [((100, 32), {}), ((64, 8), {"num_classes": 9})],
)
def test_wrong_settings_are_refused(sizes, more):
    with pytest.raises(ValueError, match="items must be a multiple"):
        make_process(*sizes, **more)


@pytest.mark.parametrize("lengths", [(2, 5), (6, 5), (3, 600)])
def test_wrong_lengths_are_refused(process, lengths):
    with pytest.raises(ValueError, match="lengths"):
        process.sample(10, *lengths)
