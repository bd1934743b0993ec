"""Coverage, popularity, Gini and the breakdown against plain loops, and the same counts whatever
the parts."""

import itertools

import numpy as np
import pytest

from genrec_dist.evaluation.list_counts import BUCKETS, Tally, bucket_names, gini
from genrec_dist.evaluation.metrics import (
    bootstrap_ci95,
    fault_counts,
    fault_rates,
    metrics_from_histogram,
    rank_histogram,
)

NUM_ITEMS = 60


def users(
    num_users: int = 300, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training counts; lists with short ends, texts without item and repeats; ranks, targets and
    history lengths."""
    rng = np.random.default_rng(seed)
    counts_I = (rng.random(NUM_ITEMS) ** 4 * 70).astype(np.int64)
    lists_UN = np.stack([rng.permutation(NUM_ITEMS)[:25] for _ in range(num_users)]).astype(
        np.int32
    )
    lists_UN[::5, 3] = -2
    lists_UN[::7, 4] = lists_UN[::7, 2]
    lists_UN[::9, 6:] = -1
    ranks_U = rng.choice([0, 0, 1, 3, 8, 15, 24], num_users)
    return (
        counts_I,
        lists_UN,
        ranks_U,
        rng.integers(0, NUM_ITEMS, num_users),
        rng.geometric(0.06, num_users),
    )


def tally_of(edges=(), **changes) -> Tally:
    counts_I, *columns = users(**changes)
    tally = Tally(counts_I)
    bounds = [0, *edges, len(columns[0])]
    for first, last in itertools.pairwise(bounds):
        tally.add(*(column[first:last] for column in columns))
    return tally


def test_bucket_names_are_as_people_write_them():
    assert bucket_names(BUCKETS["history_length"]) == [
        "1-2",
        "3-5",
        "6-10",
        "11-20",
        "21-50",
        "51+",
    ]
    assert bucket_names(BUCKETS["target_popularity"]) == [
        "0",
        "1-4",
        "5-9",
        "10-19",
        "20-49",
        "50+",
    ]


@pytest.mark.parametrize("edges", [[1], [100, 200], [0, 7, 7, 299]])
def test_any_cut_of_the_users_gives_the_same_metrics(edges):
    whole = tally_of()
    assert tally_of(edges).metrics() == whole.metrics()
    assert tally_of(edges).fault_rates() == whole.fault_rates()


def test_coverage_and_bias_equal_loops():
    counts_I, lists_UN, _, targets_U, _ = users()
    found = tally_of().metrics()
    for k in (10, 20):
        shown = {item for row in lists_UN for item in row[:k].tolist() if item >= 0}
        assert found[f"coverage@{k}"] == len(shown) / NUM_ITEMS
    listed = [item for row in lists_UN for item in row[:10].tolist() if item >= 0]
    assert found["popularity@10"] == pytest.approx(
        counts_I[listed].mean() / counts_I[targets_U].mean()
    )
    amounts = np.bincount(listed, minlength=NUM_ITEMS).astype(float)
    pairs = np.abs(amounts[:, None] - amounts[None]).sum()
    assert found["gini@10"] == pytest.approx(pairs / (2 * NUM_ITEMS * amounts.sum()))


def test_gini_of_known_shares():
    assert gini(np.array([3, 3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 9])) == pytest.approx(0.75)
    assert gini(np.zeros(4, np.int64)) is None


def test_the_breakdown_is_the_metrics_of_each_bucket():
    counts_I, _, ranks_U, targets_U, lengths_U = users()
    found = tally_of().metrics()["breakdown"]
    for name, values_U in (
        ("history_length", lengths_U),
        ("target_popularity", counts_I[targets_U]),
    ):
        assert list(found[name]) == bucket_names(BUCKETS[name])
        assert sum(bucket["users"] for bucket in found[name].values()) == 300
        for written, bucket in found[name].items():
            low, high = int(written.split("-")[0].rstrip("+")), written.split("-")[-1]
            inside = (values_U >= low) & (values_U <= (10**9 if high.endswith("+") else int(high)))
            hist = rank_histogram(ranks_U[inside])
            assert bucket["users"] == inside.sum() > 0
            for key in ("HR@10", "NDCG@10"):
                assert bucket[key] == metrics_from_histogram(hist)[key]
                assert bucket["ci95"][key] == bootstrap_ci95(hist)[key]


def test_a_bucket_without_users_has_no_scores():
    counts_I, *columns = users()
    tally = Tally(counts_I)
    columns[-1][:] = 4
    tally.add(*columns)
    found = tally.metrics()["breakdown"]["history_length"]
    assert found["1-2"] == {"users": 0, "HR@10": None, "NDCG@10": None, "ci95": {}}
    assert found["3-5"]["users"] == 300


def test_faults_are_counted_as_in_one_piece():
    counts_I, lists_UN, *_ = users()
    assert tally_of([50, 51]).fault_rates() == fault_rates(fault_counts(lists_UN, NUM_ITEMS))
    assert (fault_counts(lists_UN, NUM_ITEMS) > 0).all()
    assert len(counts_I) == NUM_ITEMS


def test_nothing_listed_or_nothing_known_has_no_ratio():
    tally = Tally(np.zeros(NUM_ITEMS, np.int64))
    tally.add(*users()[1:])
    assert tally.metrics()["popularity@10"] is None
    tally = Tally(np.ones(NUM_ITEMS, np.int64))
    tally.add(
        np.full((2, 20), -1), np.zeros(2, np.int64), np.zeros(2, np.int64), np.ones(2, np.int64)
    )
    assert (tally.metrics()["popularity@10"], tally.metrics()["gini@10"]) == (None, None)
