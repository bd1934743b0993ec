"""Each rule against a plain loop, no look at held-out items, and the known figures on real data."""

import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.histories import histories, training_counts
from genrec_shards.sequences import Sequences, read_sequences, sequences_from_ids
from random_sequences import changed, random_sequences

from genrec_dist.baselines import counting, knn, popularity, registry, repeat
from genrec_dist.cli.app import run_command
from genrec_dist.data.item_graph import KnnSettings, neighbour_weights
from genrec_dist.evaluation.list_counts import Tally
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.ranked_lists import Lists, tie_order

SPLITS = ("validation", "test")
TRAININGS = [("validation", "n-2", 2), ("test", "n-2", 2), ("test", "n-1", 1)]
"""Split, trained_through, and how many items at the end of a sequence training must not touch."""
NAMES = list(registry.BASELINES)


def lists_of(rule, sequences: Sequences, split: str, **options) -> Lists:
    """Of all users."""
    return rule.fit(sequences, split, **options)(np.arange(sequences.num_users))


def same(some: Lists, others: Lists) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True) if a is not None)


def past_of(sequences: Sequences, user: int, split: str) -> list[int]:
    view = sequences.history_and_target(split)
    return view.items[view.starts[user] : view.ends[user]].tolist()


def parts_of(sequences: Sequences, held_out: int) -> list[list[int]]:
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:] - held_out, strict=True)
    return [sequences.items[start:end].tolist() for start, end in bounds]


def filled(row: np.ndarray) -> list[int]:
    return row[row >= 0].tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_counting_equals_the_rule_in_a_loop(split):
    sequences = random_sequences()
    codes = (np.random.default_rng(1).permutation(sequences.num_items) + 1).tolist()
    lists = lists_of(counting, sequences, split, codes=[str(code) for code in codes])
    row_of = {code: row for row, code in enumerate(codes)}
    for user in range(sequences.num_users):
        taken = [codes[row] for row in past_of(sequences, user, split)]
        listed = []
        for d in range(1, 14):
            for base in (taken[-1], max(taken)):
                if base + d in row_of and base + d not in [*taken, *listed]:
                    listed.append(base + d)
        assert filled(lists.items_UN[user]) == [row_of[code] for code in listed[:20]]
    assert (lists.items_UN == -1).any()


def test_counting_passes_over_numbers_that_no_item_has():
    sequences = sequences_from_ids(["u"], [3], ["10", "14", "30"])  # history 10, 14; rows 0, 1, 2
    for codes, expected in ((["10", "14", "30"], []), (["10", "14", "27"], [2])):
        assert filled(lists_of(counting, sequences, "test", codes=codes).items_UN[0]) == expected


@pytest.mark.parametrize(
    "codes", [["1", "2", "x3"], ["1", "01", "2"], ["1", "2", "-3"], ["1", "2", "9" * 30]]
)
def test_counting_refuses_codes_that_are_not_distinct_whole_numbers(codes):
    sequences = sequences_from_ids(["u"], [3], ["a", "b", "c"])
    assert counting.whole_numbers(codes) is None
    with pytest.raises(ValueError, match="distinct whole numbers"):
        counting.fit(sequences, "test", codes=codes)
    assert beside(sequences, codes, np.arange(1))["counting"] is None


@pytest.mark.parametrize("split", SPLITS)
def test_repeat_equals_a_loop(split):
    sequences = random_sequences()
    lists = lists_of(repeat, sequences, split)
    for user in range(sequences.num_users):
        newest_first = list(dict.fromkeys(reversed(past_of(sequences, user, split))))
        assert filled(lists.items_UN[user]) == newest_first[:20]
    assert max(len(filled(row)) for row in lists.items_UN) == 20
    assert lists.scores_UN[0, :2].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("split", "through", "held_out"), TRAININGS)
def test_popularity_equals_a_loop(exclude, split, through, held_out, monkeypatch):
    monkeypatch.setattr("genrec_shards.histories.WINDOW", 7)
    sequences = random_sequences()
    counts = np.zeros(sequences.num_items, int)
    for part in parts_of(sequences, held_out):
        np.add.at(counts, part, 1)
    assert training_counts(sequences, through).tolist() == counts.tolist()
    place = np.argsort(tie_order(sequences.num_items))
    order = sorted(range(sequences.num_items), key=lambda item: (-counts[item], place[item]))
    options = {"exclude_history": exclude, "trained_through": through}
    lists = lists_of(popularity, sequences, split, **options)
    for user in range(sequences.num_users):
        past = set(past_of(sequences, user, split)) if exclude else set()
        expected = [item for item in order if item not in past][:20]
        assert lists.items_UN[user].tolist() == expected
        assert lists.scores_UN[user].tolist() == counts[expected].tolist()


DEFAULTS = KnnSettings(
    window=6, forward=1.0, backward=0.5, decay=0.7, recent=10, smoothing=1.0, batch_size=7
)
OTHERS = KnnSettings(3, 0.8, 0.1, decay=0.4, recent=4, smoothing=0.3, out_power=0.9, in_power=0.2)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize(("split", "through", "held_out"), TRAININGS)
@pytest.mark.parametrize("chosen", [DEFAULTS, OTHERS], ids=["defaults", "others"])
def test_knn_equals_a_loop(exclude, split, through, held_out, chosen):
    sequences = random_sequences(num_users=30, num_items=50)
    pairs: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts_of(sequences, held_out):
        for later in range(len(part)):
            for earlier in range(max(0, later - chosen.window), later):
                distance = later - earlier
                pairs[part[earlier]][part[later]] += chosen.forward / distance
                pairs[part[later]][part[earlier]] += chosen.backward / distance
    in_: dict[int, float] = defaultdict(float)
    for row in pairs.values():
        for y, weight in row.items():
            in_[y] += weight
    options = {"exclude_history": exclude, "trained_through": through, "settings": chosen}
    lists = lists_of(knn, sequences, split, **options)
    place = np.argsort(tie_order(sequences.num_items))
    for user in range(sequences.num_users):
        past = past_of(sequences, user, split)
        scores: dict[int, float] = defaultdict(float)
        for age, x in enumerate(past[::-1][: chosen.recent]):
            of_x = (sum(pairs[x].values()) + chosen.smoothing) ** chosen.out_power
            for y, weight in pairs[x].items():
                masses = of_x * (in_[y] + chosen.smoothing) ** chosen.in_power
                scores[y] += chosen.decay**age * weight / masses
        free = [item for item in scores if not (exclude and item in past)]
        expected = sorted(free, key=lambda item: (-np.float32(scores[item]), place[item]))[:20]
        assert filled(lists.items_UN[user]) == expected
    assert (np.diff(lists.scores_UN, axis=1)[np.isfinite(lists.scores_UN[:, 1:])] <= 0).all()


def test_knn_settings_are_set_by_name_and_written_into_the_metrics(tiny_data, tmp_path):
    words = ["--set", "window=2", "--set", "in_power=0.25"]
    assert run_command(["baseline", "knn", str(tiny_data), "--out", str(tmp_path), *words]) == 0
    metrics = json.loads((tmp_path / "metrics-test.json").read_text())
    settings = KnnSettings(window=2, in_power=0.25)
    assert metrics["recipe"] == vars(settings)
    exclude = metrics["protocol"]["exclude_history"]
    sequences = load_dataset(tiny_data).sequences
    lists = lists_of(knn, sequences, "test", exclude_history=exclude, settings=settings)
    written = pq.read_table(tmp_path / "top20-test.parquet")["scores"].to_pylist()
    assert written == [row[np.isfinite(row)].tolist() for row in lists.scores_UN]
    assert metrics["NDCG@10"] != metrics["beside"]["knn"]["NDCG@10"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("width=3", "knn: unknown key width; known here: window"),
        ("window=0", "knn: window is 0: it has to be from 1 to 10,000"),
        ("recent=1000001", "knn: recent is 1000001: it has to be from 1 to 1,000,000"),
        ("decay=-0.1", "knn: decay is -0.1: it has to be 0 or above"),
        ("recent=some", "knn: recent: 'some' is not a whole number"),
        ("window=100000000", "knn: window is 100000000: it has to be from 1 to 10,000"),
    ],
)
def test_knn_settings_that_do_not_fit_are_refused_with_nothing_written(
    override, message, tiny_data, tmp_path, capsys
):
    words = ["baseline", "knn", str(tiny_data), "--out", str(tmp_path / "run"), "--set", override]
    assert run_command(words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_equal_scores_follow_the_tie_rule():
    # Everybody took h, then one of 40 others, once each: all 40 have the same score after h.
    others = [f"x{number:02}" for number in range(40)]
    ids = [item for other in others for item in ("h", other, "p", "q")] + ["h", "p", "q"]
    sequences = sequences_from_ids([f"u{user}" for user in range(41)], [4] * 40 + [3], ids)
    order = tie_order(sequences.num_items).tolist()
    tied = [item for item in order if sequences.item_ids[item].startswith("x")]
    for rule in (knn, popularity):
        lists = lists_of(rule, sequences, "validation", exclude_history=True)
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
    options = {"exclude_history": exclude, "trained_through": "n-1"}
    listed = lists_of(rule, sequences, "test", **options)
    everything = lists_of(rule, sequences, "test", top=sequences.num_items, **options)
    assert not everything.tied_beyond_U.any()
    tied = beyond = 0
    for place in range(sequences.num_items):
        targets, scores = everything.items_UN[:, place], everything.scores_UN[:, [place]]
        known = targets >= 0
        worst = (everything.scores_UN >= scores).sum(axis=1)
        expected = np.where(known & (worst <= 20), worst, 0)
        assert listed.ranks(np.where(known, targets, 0))[known].tolist() == expected[known].tolist()
        tied += (known & (expected > place + 1)).sum()
        beyond += (known & (place < 20) & (expected == 0)).sum()
    assert min(tied, beyond) > 100


@pytest.mark.parametrize("rule", [counting, repeat])
def test_rules_whose_scores_are_places_have_no_ties(rule):
    sequences = random_sequences()
    more = {"codes": sequences.item_ids} if rule is counting else {}
    lists = lists_of(rule, sequences, "test", **more)
    assert lists.tied_beyond_U is None
    first = np.where(lists.items_UN[:, 0] >= 0, lists.items_UN[:, 0], 0)
    assert lists.ranks(first).tolist() == (lists.items_UN[:, 0] >= 0).astype(int).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_users_get_the_same_lists_alone_in_windows_and_together(name, monkeypatch):
    sequences = random_sequences()
    requested = (name, sequences, sequences.item_ids, "test")
    rule = registry.fit(*requested, exclude_history=True)
    rows = np.array([17, 3, 39, 4])
    whole, some = rule(np.arange(40)), rule(rows)
    assert same(some, Lists(*(part if part is None else part[rows] for part in whole)))
    monkeypatch.setattr("genrec_shards.histories.WINDOW", 7)
    parts = [rule(np.arange(first, min(40, first + 9))) for first in range(0, 40, 9)]
    for place in range(2 if whole.tied_beyond_U is None else 3):
        assert np.array_equal(np.concatenate([part[place] for part in parts]), whole[place])


@pytest.mark.parametrize("name", ["popularity", "knn"])
@pytest.mark.parametrize(
    ("split", "through", "last"), [("validation", "n-2", 2), ("test", "n-2", 1), ("test", "n-1", 1)]
)
def test_held_out_items_change_no_list(name, split, through, last):
    """Not even those of other users: whatever follows the history leaves scores and lists as they
    are."""
    sequences = random_sequences()
    options = {"exclude_history": True, "trained_through": through}
    lists, others = (
        registry.fit(name, data, data.item_ids, split, **options)(np.arange(data.num_users))
        for data in (sequences, changed(sequences, last))
    )
    assert same(lists, others)


def test_n_2_does_not_learn_from_validation_targets():
    sequences = random_sequences()
    other = changed(sequences, 2)
    for data in (sequences, other):
        data.items[data.offsets[1:] - 1] = 0
    for through, differs in (("n-2", False), ("n-1", True)):
        ours, others = (
            neighbour_weights(data, "test", through, KnnSettings()) for data in (sequences, other)
        )
        assert (abs(ours - others).sum() > 0) == differs


@pytest.mark.parametrize("name", NAMES)
def test_training_that_saw_the_targets_is_refused(name):
    sequences = random_sequences()
    requested = (name, sequences, sequences.item_ids, "validation")
    with pytest.raises(ValueError, match="n-1 has seen the validation targets"):
        registry.fit(*requested, exclude_history=True, trained_through="n-1")
    with pytest.raises(ValueError, match="'bpr': choose one of popularity"):
        registry.fit("bpr", *requested[1:], exclude_history=True)


def beside(sequences: Sequences, codes: list[str], users: np.ndarray) -> dict:
    numbering = SimpleNamespace(item_codes=codes)
    dataset = SimpleNamespace(sequences=sequences, numbering=numbering)
    protocol = SimpleNamespace(exclude_history=False, trained_through="n-2")
    return registry.reference_scores(dataset, "test", protocol, users)


def test_reference_scores_are_of_exactly_these_users():
    sequences = random_sequences()
    rows = np.array([5, 8, 13, 21, 34])
    found = beside(sequences, sequences.item_ids, rows)
    assert list(found) == ["counting", "popularity", "knn"]
    past = histories(sequences, "test", rows)
    for name, metrics in found.items():
        requested = (name, sequences, sequences.item_ids, "test")
        lists = registry.fit(*requested, exclude_history=False)(rows)
        tally = Tally(training_counts(sequences, "n-2"))
        tally.add(lists.items_UN, lists.ranks(past.targets_U), past.targets_U, past.lengths_U)
        assert metrics == tally.metrics()
        assert metrics["ci95"]["HR@20"][0] <= metrics["HR@20"] <= metrics["ci95"]["HR@20"][1]


@pytest.mark.data
@pytest.mark.parametrize(
    ("rule", "name", "through", "expected"),
    [
        (knn, "Beauty", "n-2", [0.0566, 0.0421, 0.0789, 0.0493]),
        pytest.param(
            *(knn, "Beauty", "n-1", [0.0663, 0.0487, 0.0880, 0.0557]), marks=pytest.mark.ranks
        ),
        pytest.param(
            *(knn, "Sports_and_Outdoors", "n-2", [0.0265, 0.0190, 0.0376, 0.0225]),
            marks=pytest.mark.ranks,
        ),
        (popularity, "Beauty", "n-2", [0.00675, None, 0.01096, None]),
    ],
)
def test_figures_on_real_data(rule, name, through, expected):
    path = Path(os.environ.get("GENREC_DATA", "data")) / f"{name}.txt.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set GENREC_DATA to the folder of the real data sets")
    sequences = read_sequences(path)
    lists = lists_of(rule, sequences, "test", exclude_history=True, trained_through=through)
    targets = sequences.history_and_target("test").targets
    metrics = metrics_from_histogram(rank_histogram(lists.ranks(targets)))
    for key, value in zip(("HR@5", "NDCG@5", "HR@10", "NDCG@10"), expected, strict=True):
        if value is not None:
            assert metrics[key] == pytest.approx(value, abs=1e-5 if rule is popularity else 6e-5)
