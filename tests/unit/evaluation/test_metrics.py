"""Metrics against two other libraries, their additivity, their intervals and the faults of
lists."""

import ir_measures
import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from genrec_dist.evaluation.metrics import (
    EMPTY,
    INVALID,
    as_written,
    bootstrap_ci95,
    fault_counts,
    fault_rates,
    listed_above,
    metrics_from_histogram,
    pessimistic_ranks,
    rank_histogram,
    target_ranks,
)

NAMES = {"HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@20"}


def random_lists(
    num_users: int = 60, num_items: int = 45, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of 20 distinct items, some cut short, and targets that are often in them."""
    rng = np.random.default_rng(seed)
    lists_UN = np.stack([rng.permutation(num_items)[:20] for _ in range(num_users)]).astype(
        np.int32
    )
    for user in range(0, num_users, 4):
        lists_UN[user, rng.integers(0, 20) :] = EMPTY
    return lists_UN, rng.integers(0, num_items, num_users).astype(np.int32)


def scored(lists_UN, targets_U):
    return metrics_from_histogram(rank_histogram(target_ranks(lists_UN, targets_U)))


def test_ranks_start_at_one_and_zero_is_absent():
    lists_UN = np.array([[7, 3, 5], [7, 3, 5], [5, 5, -1], [1, 2, -1]], dtype=np.int32)
    ranks = target_ranks(lists_UN, np.array([7, 5, 5, 9], dtype=np.int32))
    assert ranks.dtype == np.int32
    assert ranks.tolist() == [1, 3, 1, 0]
    assert rank_histogram(ranks, N=3).tolist() == [1, 2, 0, 1]
    assert rank_histogram(np.array([2, 21, 0])).tolist() == [2, 0, 1] + [0] * 18


def test_metrics_by_hand():
    metrics = metrics_from_histogram(rank_histogram(np.array([1, 3, 7, 20, 0])))
    assert set(metrics) == NAMES
    assert [metrics[f"HR@{k}"] for k in (1, 5, 10, 20)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert metrics["NDCG@5"] == pytest.approx((1 + 0.5) / 5)
    assert metrics["NDCG@10"] == pytest.approx((1 + 0.5 + 1 / 3) / 5)
    assert metrics["MRR@20"] == pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 20) / 5)


def test_metrics_equal_torchmetrics():
    lists_UN, targets_U = random_lists()
    ours = scored(lists_UN, targets_U)
    places = torch.arange(20, 0, -1).float()
    theirs = dict.fromkeys(NAMES, 0.0)
    for row, target in zip(lists_UN, targets_U, strict=True):
        # A relevant document that was not retrieved goes behind the list, out of every cutoff's
        # sight.
        preds = torch.cat([places, torch.tensor([-1.0])])
        relevant = torch.cat([torch.from_numpy(row == target), torch.tensor([target not in row])])
        for k in (1, 5, 10, 20):
            theirs[f"HR@{k}"] += float(retrieval_hit_rate(preds, relevant, top_k=k))
        for k in (5, 10, 20):
            theirs[f"NDCG@{k}"] += float(retrieval_normalized_dcg(preds, relevant.long(), top_k=k))
        theirs["MRR@20"] += float(retrieval_reciprocal_rank(preds, relevant, top_k=20))
    for name, total in theirs.items():
        assert ours[name] == pytest.approx(total / len(targets_U), abs=1e-6), name
    assert 0.1 < ours["HR@20"] < 0.9


def test_metrics_equal_ir_measures():
    lists_UN, targets_U = random_lists(seed=1)
    measures = {f"HR@{k}": ir_measures.Success @ k for k in (1, 5, 10, 20)}
    measures |= {f"NDCG@{k}": ir_measures.nDCG @ k for k in (5, 10, 20)}
    measures["MRR@20"] = ir_measures.RR @ 20
    qrels = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets_U)]
    documents = [
        ir_measures.ScoredDoc(str(user), str(item), 100.0 - place)
        for user, row in enumerate(lists_UN)
        for place, item in enumerate(row)
        if item != EMPTY
    ]
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, documents)
    ours = scored(lists_UN, targets_U)
    for name, measure in measures.items():
        assert ours[name] == pytest.approx(theirs[measure], abs=1e-9), name


def test_parts_add_up_to_the_whole_to_the_digit():
    lists_UN, targets_U = random_lists(num_users=101)
    ranks = target_ranks(lists_UN, targets_U)
    parts = rank_histogram(ranks[:37]) + rank_histogram(ranks[37:40]) + rank_histogram(ranks[40:])
    assert metrics_from_histogram(parts) == metrics_from_histogram(rank_histogram(ranks))
    assert parts.sum() == 101


def test_bootstrap_equals_drawing_users():
    ranks = np.random.default_rng(2).choice([0, 0, 0, 1, 2, 4, 8, 15], 400)
    ours = bootstrap_ci95(rank_histogram(ranks), resamples=4000)
    rng = np.random.default_rng(3)
    draws = [
        metrics_from_histogram(rank_histogram(ranks[rng.integers(0, len(ranks), len(ranks))]))
        for _ in range(4000)
    ]
    for name in NAMES:
        low, high = np.percentile([draw[name] for draw in draws], [2.5, 97.5])
        assert ours[name] == pytest.approx([low, high], abs=0.004), name
    assert ours["HR@10"][1] - ours["HR@10"][0] == pytest.approx(
        2 * 1.96 * np.sqrt(0.5 * 0.5 / 400), rel=0.15
    )


def test_bootstrap_is_seeded():
    hist = rank_histogram(np.array([0, 1, 2, 3, 0, 9]))
    assert bootstrap_ci95(hist) == bootstrap_ci95(hist)
    assert bootstrap_ci95(hist, resamples=50, seed=1) != bootstrap_ci95(hist, resamples=50, seed=2)


def test_repeats_are_marked_from_the_second_on():
    rows = np.array([[4, 2, 4, 4, 2], [1, 2, 3, 4, 5]])
    assert listed_above(rows).tolist() == [[False, False, True, True, True], [False] * 5]


def test_faults_are_shares_of_the_filled_places():
    lists_UN = np.array([[0, 1, 1, EMPTY, EMPTY], [2, INVALID, 9, INVALID, EMPTY]])
    assert fault_rates(fault_counts(lists_UN, num_items=9)) == {
        "invalid_rate": 3 / 7,
        "duplicate_rate": 1 / 7,
    }
    nothing = fault_counts(np.full((2, 3), EMPTY), num_items=9)
    assert fault_rates(nothing) == {"invalid_rate": 0.0, "duplicate_rate": 0.0}


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="2 lists for 3 targets"):
        target_ranks(np.zeros((2, 20)), np.zeros(3))
    with pytest.raises(ValueError, match="0 users"):
        metrics_from_histogram(np.zeros(21, np.int64))
    with pytest.raises(ValueError, match="shape"):
        metrics_from_histogram(np.ones(11, np.int64))
    with pytest.raises(ValueError, match="rank -1"):
        rank_histogram(np.array([-1, 3]))


def test_figures_as_the_field_writes_them():
    assert [as_written(value) for value in (0.0566, 0.0, 1.0, None)] == [
        ".0566",
        ".0000",
        "1.0000",
        "–",
    ]


def test_ties_rank_pessimistically():
    lists_UN = np.array([[4, 2, 7, 1]] * 3 + [[4, 2, EMPTY, EMPTY]] * 2, dtype=np.int32)
    scores_UN = np.array(
        [[3, 2, 2, 1]] * 2 + [[3, 2, 2, 2]] + [[2, 2, -np.inf, -np.inf]] * 2, dtype=np.float32
    )
    beyond_U = np.array([False, True, True, False, True])
    for target, expected in (
        (4, [1, 1, 1, 2, 0]),
        (2, [3, 3, 0, 2, 0]),
        (1, [4, 0, 0, 0, 0]),
        (9, [0] * 5),
    ):
        ranks = target_ranks(lists_UN, np.full(5, target))
        assert pessimistic_ranks(ranks, scores_UN, beyond_U).tolist() == expected, target


def test_bootstrap_of_some_metrics_is_that_of_all():
    hist = rank_histogram(np.array([0, 1, 2, 3, 0, 9]))
    assert bootstrap_ci95(hist, names=["NDCG@10"]) == {"NDCG@10": bootstrap_ci95(hist)["NDCG@10"]}
