"""kNN's settings chosen on validation."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.sequences import Sequences
from random_sequences import changed, random_sequences

from genrec_dist.baselines import knn
from genrec_dist.baselines import tune_knn as module
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.tune_knn import VALUES, beside, drawn, tune_knn
from genrec_dist.cli.app import run_command
from genrec_dist.data.item_graph import KnnSettings, forward_pairs, neighbour_weights
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram

NDCG = "NDCG@10"


def test_pairs_count_each_step_to_a_later_item() -> None:
    sequences = random_sequences(num_users=12, num_items=20)
    expected = np.zeros((sequences.num_items, sequences.num_items))
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:] - 2, strict=True):
        row = sequences.items[begin:end]
        for earlier in range(len(row)):
            for distance in range(1, min(4, len(row) - earlier)):
                expected[row[earlier], row[earlier + distance]] += 1 / distance
    np.testing.assert_allclose(forward_pairs(sequences, "n-2", 3).toarray(), expected)
    settings = KnnSettings(window=3, backward=0.25, out_power=0, in_power=0)
    weights = neighbour_weights(sequences, "test", "n-2", settings).toarray()
    np.testing.assert_allclose(weights, expected + 0.25 * expected.T)


def test_the_figure_is_that_of_the_baseline_and_no_neighbour_is_better(
    tiny_data: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(tiny_data)
    tries: list[float] = []
    found = tune_knn(
        dataset.sequences, exclude_history=True, on_try=lambda _, ndcg: tries.append(ndcg)
    )
    assert found.ndcg == max(tries)
    assert found.tried == len(tries)

    def baseline(settings: KnnSettings, place: str) -> float:
        words = [f"{key}={getattr(settings, key)}" for key in VALUES]
        return run_baseline("knn", dataset, "validation", tmp_path / place, settings=words)[NDCG]

    assert baseline(found.settings, "best") == pytest.approx(found.ndcg, abs=1e-12)
    assert found.ndcg > baseline(KnnSettings(), "defaults")
    other = next(beside(found.settings, "decay"))
    assert baseline(other, "other") <= found.ndcg


def test_draws_are_known_values_and_neighbours_differ_in_one() -> None:
    settings = list(drawn(0))
    assert settings == list(drawn(0))
    assert settings != list(drawn(1))
    assert len(set(settings)) > 20
    for drawn_one in settings:
        assert all(getattr(drawn_one, key) in known for key, known in VALUES.items())
    one = replace(KnnSettings(), window=1)
    assert [other.window for other in beside(one, "window")] == [2]
    assert [other.window for other in beside(replace(one, window=6), "window")] == [3, 10]


def test_test_items_choose_nothing_and_repeated_targets_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DRAWN", 3)
    sequences = random_sequences(num_users=80, num_items=30)
    found = tune_knn(sequences, exclude_history=True)
    assert found == tune_knn(changed(sequences, 1), exclude_history=True)
    assert found != tune_knn(changed(sequences, 2), exclude_history=True)
    # Where the history is left out, a target that repeats it can never be listed.
    assert found.ndcg > tune_knn_on_all(sequences, found.settings)


def tune_knn_on_all(sequences: Sequences, settings: KnnSettings) -> float:
    """NDCG@10 over all validation users, the history left out."""
    view = sequences.history_and_target("validation")
    lists = knn.fit(sequences, "validation", exclude_history=True, settings=settings)(view.users)
    histogram = rank_histogram(lists.ranks(view.targets[view.users]))
    return metrics_from_histogram(histogram)[NDCG]


def test_baseline_knn_tunes_itself(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["baseline", "knn", str(tiny_data), "--out", str(tmp_path), "--tune"]
    assert run_command(command) == 0
    assert "knn's settings, the best of" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics-test.json").read_text())
    found = tune_knn(load_dataset(tiny_data).sequences, exclude_history=True)
    assert metrics["recipe"] == asdict(found.settings)
    assert run_command([*command, "--set", "window=2"]) == 2
    assert "--tune chooses the settings of knn" in capsys.readouterr().err
