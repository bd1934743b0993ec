"""The transition graph: its probabilities are the kNN scores, and it knows no held-out item."""

from __future__ import annotations

import numpy as np
import pytest
from genrec_shards.histories import histories
from genrec_shards.sequences import sequences_from_ids
from random_sequences import changed, random_sequences

from genrec_dist.baselines import knn
from genrec_dist.data.item_graph import Graph, KnnSettings, log_near


def test_probabilities_are_the_knn_scores_over_their_sum() -> None:
    sequences = random_sequences(num_users=30, num_items=50)
    chosen = KnnSettings(recent=4, in_power=0.1)
    past = histories(sequences, "test")
    prob_UI = (
        Graph.of(sequences, "test", "n-2", chosen).probabilities(past.items, past.offsets).numpy()
    )
    np.testing.assert_allclose(prob_UI.sum(1), 1.0)
    rule = knn.fit(
        sequences, "test", exclude_history=False, settings=chosen, top=sequences.num_items
    )
    lists = rule(sequences.history_and_target("test").users)
    for listed, scores, prob_I in zip(lists.items_UN, lists.scores_UN, prob_UI, strict=True):
        count = (listed >= 0).sum()
        np.testing.assert_allclose(
            prob_I[listed[:count]] * (scores[0] / prob_I[listed[0]]), scores[:count], rtol=1e-5
        )
        assert (prob_I > 0).sum() == count
    stranger = sequences_from_ids(
        ["u", "v", "w"], [3, 3, 3], ["a", "b", "c", "a", "b", "c", "d", "d", "d"]
    )
    prob_UI = Graph.of(stranger, "validation", "n-2").probabilities(np.array([2]), np.array([0, 1]))
    assert not prob_UI.any()
    np.testing.assert_allclose(log_near(prob_UI, 0.1, 4).exp(), 0.1 / 4)


@pytest.mark.parametrize(("through", "last"), [("n-2", 2), ("n-1", 1)])
def test_graph_knows_no_held_out_item(through: str, last: int) -> None:
    sequences = random_sequences()
    ours, others, nearer = (
        Graph.of(data, "test", through).weights_NN
        for data in (sequences, changed(sequences, last), changed(sequences, last + 1))
    )
    assert abs(ours - others).sum() == 0
    assert abs(ours - nearer).sum() > 0
    with pytest.raises(ValueError, match="n-1 has seen the validation targets"):
        Graph.of(sequences, "validation", "n-1")


def test_only_new_gives_the_history_no_share() -> None:
    sequences = random_sequences(num_users=30, num_items=50)
    past = histories(sequences, "test")
    graph = Graph.of(sequences, "test", "n-2")
    every_UI = graph.probabilities(past.items, past.offsets).numpy()
    new_UI = graph.probabilities(past.items, past.offsets, only_new=True).numpy()
    taken_UI = past.holds(np.arange(past.num_users)[:, None], np.arange(past.num_items)[None])
    assert (every_UI * taken_UI).sum() > 0
    expected_UI = np.where(taken_UI, 0, every_UI)
    np.testing.assert_allclose(new_UI, expected_UI / expected_UI.sum(1, keepdims=True))
