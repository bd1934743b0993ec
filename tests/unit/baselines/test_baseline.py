"""Each rule against a plain loop, no look at held-out items, and the known figures on real data."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.histories import histories, training_counts
from genrec_shards.sequences import Sequences, read_sequences, sequences_from_ids
from random_sequences import changed, random_sequences

from genrec_dist.baselines import counting, knn, popularity, repeat
from genrec_dist.baselines import registry as baseline
from genrec_dist.cli.app import run_command
from genrec_dist.data.item_graph import KnnSettings, neighbour_weights
from genrec_dist.evaluation.list_counts import Tally
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.ranked_lists import tie_order

SPLITS = ("validation", "test")
TRAININGS = [("validation", "n-2", 2), ("test", "n-2", 2), ("test", "n-1", 1)]
"""Split, trained_through, and how many items at the end of a sequence training must not touch."""


def past_of(sequences: Sequences, user: int, split: str) -> list[int]:
    view = sequences.history_and_target(split)
    return view.items[view.starts[user] : view.ends[user]].tolist()


def filled(row: np.ndarray) -> list[int]:
    return row[row >= 0].tolist()


def counting_by_loop(past: list[int], codes: list[int], top: int = 20) -> list[int]:
    row_of = {code: row for row, code in enumerate(codes)}
    taken = [codes[row] for row in past]
    listed = []
    for d in range(1, 14):
        for base in (taken[-1], max(taken)):
            if base + d in row_of and base + d not in taken and base + d not in listed:
                listed.append(base + d)
    return [row_of[code] for code in listed[:top]]


@pytest.mark.parametrize("split", SPLITS)
def test_counting_equals_the_rule_in_a_loop(split):
    sequences = random_sequences()
    codes = np.random.default_rng(1).permutation(sequences.num_items) + 1
    lists = counting.recommend(sequences, split, codes=[str(code) for code in codes])
    for user in range(sequences.num_users):
        assert filled(lists.items_UN[user]) == counting_by_loop(
            past_of(sequences, user, split), codes.tolist()
        )
    assert (lists.items_UN == -1).any()


def test_counting_passes_over_numbers_that_no_item_bears():
    sequences = sequences_from_ids(["u"], [3], ["10", "14", "30"])  # history 10, 14; rows 0, 1, 2
    assert counting.recommend(sequences, "test", codes=["10", "14", "30"]).items_UN[0, 0] == -1
    assert (
        counting.recommend(sequences, "test", codes=["10", "14", "27"]).items_UN[0].tolist()
        == [2] + [-1] * 19
    )


@pytest.mark.parametrize(
    "codes", [["1", "2", "x3"], ["1", "01", "2"], ["1", "2", "-3"], ["1", "2", "9" * 30]]
)
def test_counting_refuses_codes_that_are_not_distinct_whole_numbers(codes):
    sequences = sequences_from_ids(["u"], [3], ["a", "b", "c"])
    assert counting.whole_numbers(codes) is None
    with pytest.raises(ValueError, match="distinct whole numbers"):
        counting.recommend(sequences, "test", codes=codes)
    assert baseline.beside(sequences, codes, "test", exclude_history=True)["counting"] is None


@pytest.mark.parametrize("split", SPLITS)
def test_repeat_equals_a_loop(split):
    sequences = random_sequences()
    lists = repeat.recommend(sequences, split)
    for user in range(sequences.num_users):
        newest_first = list(dict.fromkeys(reversed(past_of(sequences, user, split))))
        assert filled(lists.items_UN[user]) == newest_first[:20]
    assert max(len(filled(row)) for row in lists.items_UN) == 20
    assert lists.scores_UN[0, :2].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("split", "through", "held_out"), TRAININGS)
def test_popularity_equals_a_loop(exclude, split, through, held_out):
    sequences = random_sequences()
    counts = np.zeros(sequences.num_items, int)
    for user in range(sequences.num_users):
        np.add.at(
            counts,
            sequences.items[sequences.offsets[user] : sequences.offsets[user + 1] - held_out],
            1,
        )
    place = np.argsort(tie_order(sequences.num_items))
    order = sorted(range(sequences.num_items), key=lambda item: (-counts[item], place[item]))
    lists = popularity.recommend(sequences, split, exclude_history=exclude, trained_through=through)
    for user in range(sequences.num_users):
        past = set(past_of(sequences, user, split)) if exclude else set()
        expected = [item for item in order if item not in past][:20]
        assert lists.items_UN[user].tolist() == expected
        assert lists.scores_UN[user].tolist() == counts[expected].tolist()


def knn_by_loop(
    sequences: Sequences, split: str, held_out: int, exclude: bool, user: int, chosen: KnnSettings
) -> list[int]:
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for someone in range(sequences.num_users):
        part = sequences.items[
            sequences.offsets[someone] : sequences.offsets[someone + 1] - held_out
        ].tolist()
        for later in range(len(part)):
            for earlier in range(max(0, later - chosen.window), later):
                pairs[part[earlier], part[later]] += chosen.forward / (later - earlier)
                pairs[part[later], part[earlier]] += chosen.backward / (later - earlier)
    out, in_ = defaultdict(float), defaultdict(float)
    for (x, y), weight in pairs.items():
        out[x] += weight
        in_[y] += weight
    past = past_of(sequences, user, split)
    scores: dict[int, float] = defaultdict(float)
    for age, x in enumerate(past[::-1][: chosen.recent]):
        for (other, y), weight in pairs.items():
            if other == x:
                masses = (out[x] + chosen.smoothing) ** chosen.out_power * (
                    in_[y] + chosen.smoothing
                ) ** chosen.in_power
                scores[y] += chosen.decay**age * weight / masses
    place = np.argsort(tie_order(sequences.num_items))
    free = [item for item in scores if not (exclude and item in past)]
    return sorted(free, key=lambda item: (-np.float32(scores[item]), place[item]))[:20]


DEFAULTS = KnnSettings(
    window=6, forward=1.0, backward=0.5, decay=0.7, recent=10, smoothing=1.0, batch_size=7
)
OTHERS = KnnSettings(
    window=3,
    forward=0.8,
    backward=0.1,
    decay=0.4,
    recent=4,
    smoothing=0.3,
    out_power=0.9,
    in_power=0.2,
)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("split", "through", "held_out"), TRAININGS)
@pytest.mark.parametrize("chosen", [DEFAULTS, OTHERS], ids=["defaults", "others"])
def test_knn_equals_a_loop(exclude, split, through, held_out, chosen):
    sequences = random_sequences(num_users=30, num_items=50)
    lists = knn.recommend(
        sequences, split, exclude_history=exclude, trained_through=through, settings=chosen
    )
    for user in range(sequences.num_users):
        expected = knn_by_loop(sequences, split, held_out, exclude, user, chosen)
        assert filled(lists.items_UN[user]) == expected
    assert (np.diff(lists.scores_UN, axis=1)[np.isfinite(lists.scores_UN[:, 1:])] <= 0).all()


def test_settings_are_set_by_name_and_stand_in_the_metrics(tiny_data, tmp_path):
    command = ["baseline", "knn", str(tiny_data), "--out", str(tmp_path)]
    words = ["--set", "window=2", "--set", "in_power=0.25"]
    assert run_command([*command, *words]) == 0
    metrics = json.loads((tmp_path / "metrics-test.json").read_text())
    assert metrics["recipe"] == {**vars(KnnSettings()), "window": 2, "in_power": 0.25}
    lists = knn.recommend(
        load_dataset(tiny_data).sequences,
        "test",
        exclude_history=metrics["protocol"]["exclude_history"],
        settings=KnnSettings(window=2, in_power=0.25),
    )
    written = pq.read_table(tmp_path / "top20-test.parquet")["scores"].to_pylist()
    assert written == [row[np.isfinite(row)].tolist() for row in lists.scores_UN]
    assert metrics["NDCG@10"] != metrics["beside"]["knn"]["NDCG@10"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("width=3", "knn: unknown key width; known here: window"),
        ("window=0", "knn: window is 0: it has to be 1 or above"),
        ("decay=-0.1", "knn: decay is -0.1: it has to be 0 or above"),
        ("recent=some", "knn: recent: 'some' is not of type int"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_nothing_written(
    override, said, tiny_data, tmp_path, capsys
):
    assert (
        run_command(
            ["baseline", "knn", str(tiny_data), "--out", str(tmp_path / "run"), "--set", override]
        )
        == 1
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_equal_scores_follow_the_tie_rule():
    # Everybody took h, then one of 40 others, once each: all 40 have one and the same score after
    # h.
    others = [f"x{number:02}" for number in range(40)]
    ids = [item for other in others for item in ("h", other, "p", "q")] + ["h", "p", "q"]
    sequences = sequences_from_ids([f"u{user}" for user in range(41)], [4] * 40 + [3], ids)
    tied = [
        item
        for item in tie_order(sequences.num_items).tolist()
        if sequences.item_ids[item].startswith("x")
    ]
    for lists in (
        knn.recommend(sequences, "validation", exclude_history=True),
        popularity.recommend(sequences, "validation", exclude_history=True),
    ):
        assert lists.items_UN[40].tolist() == tied[:20]
        # 40 tie and 20 of them are listed: whichever the target is, 39 count as above it.
        assert lists.ranks(np.full(41, tied[3], np.int32))[40] == 0
    assert tied != sorted(tied)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("rule", [popularity, knn])
def test_all_items_that_tie_with_a_target_rank_above_it(rule, exclude):
    """Against scores of the whole catalogue: a target's rank is the number of items that score as
    high or higher."""
    # Everybody begins with 0, and few numbers of pairs occur after it: many scores are equal.
    rng = np.random.default_rng(3)
    draws = [str(item) for user in range(150) for item in (0, *rng.integers(1, 70, 2))]
    sequences = sequences_from_ids([f"u{user}" for user in range(150)], [3] * 150, draws)
    everything, listed = (
        rule.recommend(sequences, "test", exclude_history=exclude, trained_through="n-1", top=top)
        for top in (sequences.num_items, 20)
    )
    assert not everything.tied_beyond_U.any()
    tied = beyond = 0
    for place in range(sequences.num_items):
        targets = everything.items_UN[:, place]
        known = targets >= 0
        scores = np.take_along_axis(everything.scores_UN, np.full((150, 1), place), axis=1)
        worst = (everything.scores_UN >= scores).sum(axis=1)
        expected = np.where(known & (worst <= 20), worst, 0)
        assert listed.ranks(np.where(known, targets, 0))[known].tolist() == expected[known].tolist()
        tied += (known & (expected > place + 1)).sum()
        beyond += (known & (place < 20) & (expected == 0)).sum()
    assert tied > 100
    assert beyond > 100


@pytest.mark.parametrize("rule", [counting, repeat])
def test_rules_whose_scores_are_places_have_no_ties(rule):
    sequences = random_sequences()
    more = {"codes": sequences.item_ids} if rule is counting else {}
    lists = rule.recommend(sequences, "test", **more)
    assert lists.tied_beyond_U is None
    first = np.where(lists.items_UN[:, 0] >= 0, lists.items_UN[:, 0], 0)
    assert lists.ranks(first).tolist() == (lists.items_UN[:, 0] >= 0).astype(int).tolist()


@pytest.mark.parametrize("name", list(baseline.BASELINES))
def test_windows_of_users_change_no_list(name, monkeypatch):
    sequences = random_sequences()
    asked = (name, sequences, sequences.item_ids, "test")
    whole = baseline.recommend(*asked, exclude_history=True)
    monkeypatch.setattr("genrec_shards.histories.WINDOW", 7)
    rule = baseline.fit(*asked, exclude_history=True)
    parts = [rule(np.arange(first, min(40, first + 9))) for first in range(0, 40, 9)]
    for place in range(2 if whole.tied_beyond_U is None else 3):
        assert np.array_equal(np.concatenate([part[place] for part in parts]), whole[place])


@pytest.mark.parametrize(("through", "held_out"), [("n-2", 2), ("n-1", 1)])
def test_training_counts_equal_a_loop(through, held_out, monkeypatch):
    monkeypatch.setattr("genrec_shards.histories.WINDOW", 7)
    sequences = random_sequences()
    expected = np.zeros(sequences.num_items, int)
    for user in range(sequences.num_users):
        np.add.at(
            expected,
            sequences.items[sequences.offsets[user] : sequences.offsets[user + 1] - held_out],
            1,
        )
    assert training_counts(sequences, through).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["popularity", "knn"])
@pytest.mark.parametrize(
    ("split", "through", "last"), [("validation", "n-2", 2), ("test", "n-2", 1), ("test", "n-1", 1)]
)
def test_held_out_items_change_no_list(name, split, through, last):
    """Not even other users' ones: whatever stands after the history leaves scores and lists as they
    are."""
    sequences = random_sequences()
    lists, others = (
        baseline.recommend(
            name, data, data.item_ids, split, exclude_history=True, trained_through=through
        )
        for data in (sequences, changed(sequences, last))
    )
    assert np.array_equal(lists.items_UN, others.items_UN)
    assert np.array_equal(lists.scores_UN, others.scores_UN)


def test_n_2_does_not_learn_from_validation_targets():
    sequences = random_sequences()
    other = changed(sequences, 2)
    for data in (sequences, other):
        data.items[data.offsets[1:] - 1] = 0
    settings = KnnSettings()
    weights = [neighbour_weights(data, "test", "n-2", settings) for data in (sequences, other)]
    assert abs(weights[0] - weights[1]).sum() == 0
    weights = [neighbour_weights(data, "test", "n-1", settings) for data in (sequences, other)]
    assert abs(weights[0] - weights[1]).sum() > 0


@pytest.mark.parametrize("name", list(baseline.BASELINES))
def test_chosen_users_get_the_lists_that_all_users_get(name):
    sequences = random_sequences()
    rows = np.array([17, 3, 39, 4])
    some, everybody = (
        baseline.recommend(
            name, sequences, sequences.item_ids, "test", exclude_history=True, users=users
        )
        for users in (rows, None)
    )
    assert np.array_equal(some.items_UN, everybody.items_UN[rows])
    assert np.array_equal(some.scores_UN, everybody.scores_UN[rows])


@pytest.mark.parametrize("name", list(baseline.BASELINES))
def test_training_that_saw_the_targets_is_refused(name):
    sequences = random_sequences()
    with pytest.raises(ValueError, match="n-1 has seen the validation targets"):
        baseline.recommend(
            name,
            sequences,
            sequences.item_ids,
            "validation",
            exclude_history=True,
            trained_through="n-1",
        )


def test_unknown_name_is_refused():
    sequences = random_sequences()
    with pytest.raises(ValueError, match="'bpr': choose one of popularity"):
        baseline.recommend("bpr", sequences, sequences.item_ids, "test", exclude_history=True)


def test_beside_scores_exactly_these_users():
    sequences = random_sequences()
    rows = np.array([5, 8, 13, 21, 34])
    beside = baseline.beside(
        sequences, sequences.item_ids, "test", exclude_history=False, users=rows
    )
    assert list(beside) == ["counting", "popularity", "knn"]
    past = histories(sequences, "test", rows)
    for name, metrics in beside.items():
        lists = baseline.recommend(
            name, sequences, sequences.item_ids, "test", exclude_history=False, users=rows
        )
        tally = Tally(training_counts(sequences, "n-2"))
        tally.add(lists.items_UN, lists.ranks(past.targets_U), past.targets_U, past.lengths_U)
        assert metrics == tally.metrics()
        assert metrics["ci95"]["HR@20"][0] <= metrics["HR@20"] <= metrics["ci95"]["HR@20"][1]


def test_histories_hold_what_they_hold():
    sequences = random_sequences()
    past = histories(sequences, "test", np.array([7, 2]))
    held = past.holds(np.arange(2)[:, None], np.arange(sequences.num_items)[None])
    for place, user in enumerate((7, 2)):
        assert set(np.flatnonzero(held[place]).tolist()) == set(past_of(sequences, user, "test"))


def real(name: str) -> Sequences:
    path = Path(os.environ.get("GENREC_DATA", "data")) / f"{name}.txt.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set GENREC_DATA to the folder of the real data sets")
    return read_sequences(path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "through", "expected"),
    [
        ("Beauty", "n-2", [0.0566, 0.0421, 0.0789, 0.0493]),
        ("Beauty", "n-1", [0.0663, 0.0487, 0.0880, 0.0557]),
        ("Sports_and_Outdoors", "n-2", [0.0265, 0.0190, 0.0376, 0.0225]),
    ],
)
def test_knn_figures_on_real_data(name, through, expected):
    sequences = real(name)
    lists = knn.recommend(sequences, "test", exclude_history=True, trained_through=through)
    targets = sequences.history_and_target("test").targets
    metrics = metrics_from_histogram(rank_histogram(lists.ranks(targets)))
    assert [metrics[key] for key in ("HR@5", "NDCG@5", "HR@10", "NDCG@10")] == pytest.approx(
        expected, abs=6e-5
    )


@pytest.mark.data
def test_popularity_figure_on_beauty():
    sequences = real("Beauty")
    lists = popularity.recommend(sequences, "test", exclude_history=True)
    ranks = lists.ranks(sequences.history_and_target("test").targets)
    metrics = metrics_from_histogram(rank_histogram(ranks))
    assert [metrics["HR@5"], metrics["HR@10"]] == pytest.approx([0.00675, 0.01096], abs=1e-5)
