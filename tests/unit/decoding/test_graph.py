"""The transition graph mixed with a decoder, an item head and SASRec, against brute force over all
items; its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from beam_oracle import (
    PREFIXES,
    History,
    Word,
    World,
    best_first,
    catalogues,
    histories_of,
    sharp_model,
)
from genrec_shards.dataset import load_dataset
from genrec_shards.histories import histories
from genrec_shards.sequences import Sequences, sequences_from_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st
from item_oracle import item_truth, item_world
from random_sequences import changed, random_sequences

from genrec_dist.baselines import knn
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec_model import scored
from genrec_dist.baselines.sasrec_run import open_or_train
from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.data.item_graph import Graph, KnnSettings, log_near, neighbour_weights
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.training.run import train

NDCG = "NDCG@10"


def graph_among(items: list[Word], seed: int = 5) -> Graph:
    """Of random sequences over these items, some of which nobody ever took."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, max(1, len(items) - 1), 60).astype(np.int32)
    ids = [f"{row:03}" for row in range(len(items))]
    sequences = Sequences(draws, np.arange(0, 61, 6), [f"u{user}" for user in range(10)], ids)
    return Graph.of(sequences, "test", "n-2", KnnSettings(window=2, recent=3))


def shares_of(graph: Graph, past: list[History]) -> torch.Tensor:
    items = np.array([item for history in past for item in history], np.int32)
    return graph.shares(items, np.cumsum([0, *map(len, past)]))


@settings(max_examples=30, deadline=None)
@given(
    catalogues,
    histories_of,
    st.booleans(),
    st.booleans(),
    st.sampled_from([(0.3, 0.1), (2.0, 0.9), (1.0, 1e-6)]),
)
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, False, (1.0, 0.5))
def test_hybrid_with_a_wide_beam_is_the_mixture_of_all_its_parts(
    items: list[Word],
    draws: list[History],
    exclude: bool,
    has_head: bool,
    weights: tuple[float, float],
) -> None:
    """With and without an item head."""
    past = [[draw % len(items) for draw in history] for history in draws]
    world = item_world(items) if has_head else World(items, sharp_model(num_items=len(items)))
    graph = graph_among(items)
    weight, epsilon = weights
    shares_BN = shares_of(graph, past)
    truth_BN = world.brute_force(past) + weight * np.log(
        (1 - epsilon) * shares_BN.numpy() + epsilon / len(items)
    )
    if has_head:
        truth_BN = truth_BN + 0.7 * item_truth(world, past)
    lists = world.search(
        past,
        beam=world.widest_level,
        top=len(items),
        exclude=exclude,
        mode="hybrid",
        mixture=Mixture(0.7, weight, epsilon, graph.settings),
        shares_BN=shares_BN,
    )
    for history, found, truth_N in zip(past, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[[item for item, _ in found]], rtol=1e-6
        )


def test_a_narrow_beam_still_sees_the_graphs_best() -> None:
    items = [(5, a, b) for a in (5, 6, 7, 8) for b in (5, 6, 7, 8)]
    world, graph = World(items, sharp_model(num_items=len(items))), graph_among(items)
    shares_BN = shares_of(graph, [[1, 2]])
    (spoken,) = world.search([[1, 2]], beam=2, top=2)
    (found,) = world.search(
        [[1, 2]],
        beam=2,
        top=2,
        mode="hybrid",
        mixture=Mixture(graph_weight=1000.0),
        shares_BN=shares_BN,
    )
    assert {item for item, _ in found} == set(shares_BN[0].topk(2).indices.tolist())
    assert {item for item, _ in found} != {item for item, _ in spoken}


def test_shares_are_the_knn_scores_over_their_sum() -> None:
    sequences = random_sequences(num_users=30, num_items=50)
    chosen = KnnSettings(recent=4, in_power=0.1)
    past = histories(sequences, "test")
    shares_UI = Graph.of(sequences, "test", "n-2", chosen).shares(past.items, past.offsets).numpy()
    np.testing.assert_allclose(shares_UI.sum(1), 1.0)
    rule = knn.fit(
        sequences, "test", exclude_history=False, settings=chosen, top=sequences.num_items
    )
    lists = rule(np.arange(sequences.num_users))
    for listed, scores, shares in zip(lists.items_UN, lists.scores_UN, shares_UI, strict=True):
        count = (listed >= 0).sum()
        np.testing.assert_allclose(
            shares[listed[:count]] * (scores[0] / shares[listed[0]]), scores[:count], rtol=1e-5
        )
        assert (shares > 0).sum() == count
    stranger = sequences_from_ids(
        ["u", "v", "w"], [3, 3, 3], ["a", "b", "c", "a", "b", "c", "d", "d", "d"]
    )
    shares_UI = Graph.of(stranger, "validation", "n-2").shares(np.array([2]), np.array([0, 1]))
    assert not shares_UI.any()
    np.testing.assert_allclose(log_near(shares_UI, 0.1, 4).exp(), 0.1 / 4)


@pytest.mark.parametrize(("through", "last"), [("n-2", 2), ("n-1", 1)])
def test_the_graph_knows_no_held_out_item(through: str, last: int) -> None:
    sequences = random_sequences()
    ours, others, nearer = (
        Graph.of(data, "test", through).weights_NN for data in (sequences, changed(sequences, last), changed(sequences, last + 1))
    )  # fmt: skip
    assert abs(ours - others).sum() == 0
    assert abs(ours - nearer).sum() > 0
    with pytest.raises(ValueError, match="n-1 has seen the validation targets"):
        Graph.of(sequences, "validation", "n-1")


# Weights.


def test_a_grid_holds_each_mixture_once_and_the_best_is_the_first_of_the_best() -> None:
    tried = mixture.grid((0.0, 1.0), KnnSettings())
    assert (
        len(tried)
        == len(set(tried))
        == 2 * (1 + len(mixture.EPSILONS) * (len(mixture.GRAPH_WEIGHTS) - 1))
    )
    counts = np.zeros((len(tried), 21), np.int64)
    counts[:, 0] = 10
    counts[[7, 9], 2] += 3
    choice = mixture.choose(tried, counts)
    assert choice.mixture == tried[7]
    assert choice.users == 13
    assert choice.validation == {
        key: pytest.approx(metrics_from_histogram(counts[7])[key]) for key in mixture.METRICS
    }


def test_weights_are_read_as_they_were_written_and_refused_elsewhere(tmp_path: Path) -> None:
    tried = mixture.grid((1.0,), KnnSettings(window=3))
    counts = np.zeros((len(tried), 21), np.int64)
    counts[-2, 1] = 4
    counts[:, 0] += 1
    choice = mixture.choose(tried, counts)
    assert mixture.load(tmp_path, {"data": "x"}) is None
    path = mixture.save(choice, tmp_path, {"data": "x"})
    assert mixture.load(tmp_path, {"data": "x"}) == tried[-2]
    with pytest.raises(
        ValueError, match=r"hybrid\.json: weights chosen for data x, not y: remove it"
    ):
        mixture.load(tmp_path, {"data": "y"})
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"hybrid\.json: not readable .*choose the weights again"):
        mixture.load(tmp_path, {"data": "x"})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"graph_weight": -1.0}, "graph_weight is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0: it has to be above 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(**values)


@pytest.mark.parametrize("has_head", [False, True], ids=["decoder", "item-head"])
def test_weights_chosen_in_one_pass_are_those_that_evaluation_finds_best(
    tiny_recipe, has_head: bool
) -> None:
    """Each mixture's figure equals that of its own evaluation; the best one is what test then uses
    by default."""
    run = train(load_recipe(tiny_recipe, ["model.item_loss=0.5"] if has_head else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "GRAPH_WEIGHTS", (0.0, 0.3, 3.0))
        patch.setattr(mixture, "EPSILONS", (0.1, 0.9))
        patch.setattr(mixture, "ITEM_WEIGHTS", (0.0, 2.0))
        command = ["evaluate", str(run), "--decode", "hybrid"]
        assert (
            run_command(
                [*command, "--split", "validation", "--tune-weights", "--graph-set", "window=2"]
            )
            == 0
        )
    held = json.loads((run / "hybrid.json").read_text())
    assert len(held["table"]) == (2 if has_head else 1) * 5
    assert not (run / "metrics-validation.json").exists()
    found = {}
    for item_weight, weight, epsilon, figure in held["table"]:
        words = [
            "--item-weight",
            str(item_weight),
            "--graph-weight",
            str(weight),
            "--graph-set",
            f"epsilon={epsilon}",
        ]
        if has_head or weight:
            assert run_command([*command, "--split", "validation", *words]) == 0
            metrics = json.loads((run / "metrics-validation.json").read_text())
            assert metrics[NDCG] == pytest.approx(figure, abs=1e-12)
        found[item_weight, weight, epsilon] = figure
    assert len(set(found.values())) > 1
    chosen = held["mixture"]
    assert found[chosen["item_weight"], chosen["graph_weight"], chosen["epsilon"]] == max(
        found.values()
    )
    if has_head or chosen["graph_weight"]:
        assert run_command([*command, "--split", "test"]) == 0
        metrics = json.loads((run / "metrics-test.json").read_text())
        assert metrics["system"] == "genrec, hybrid"
        assert metrics["protocol"]["item_weight"] == (chosen["item_weight"] if has_head else None)
        graph = {"weight": chosen["graph_weight"], "epsilon": chosen["epsilon"], **chosen["graph"]}
        assert metrics["protocol"]["graph"] == (graph if chosen["graph_weight"] else None)
    assert chosen["graph"]["window"] == 2


def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, said in [
        (["--tune-weights", "--decode", "hybrid"], "--tune-weights goes with"),
        (["--graph-weight", "0.5"], "--decode exact has no graph"),
    ]:
        assert run_command(["evaluate", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err


# The control.

TINY_SET = [
    f"sasrec.{text}" for text in ("d_model=16", "batch_size=16", "epochs=2", "max_length=12")
]


@pytest.fixture(scope="module")
def control(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("control")
    words = [word for text in [*TINY_SET, "knn.window=2"] for word in ("--set", text)]
    assert run_command(["baseline", "sasrec+knn", str(tiny_data), "--out", str(path), *words]) == 0
    return path


def control_scores(
    control: Path, data: Path, split: str, weight: float, epsilon: float
) -> np.ndarray:
    """float64 [U, I] of all items, -inf for those of the history, in numpy."""
    dataset = load_dataset(data)
    model = open_or_train(control / "sasrec", dataset, "test", exclude_history=True).model
    view = dataset.sequences.history_and_target(split)
    rows = np.arange(len(view.targets))
    logits_UI = np.concatenate(
        [part.numpy() for _, part in scored(model, view, rows, False)]
    ).astype(np.float64)
    logp_UI = logits_UI - np.log(np.exp(logits_UI).sum(1, keepdims=True))
    weights_II = neighbour_weights(
        dataset.sequences, "test", "n-2", KnnSettings(window=2)
    ).toarray()
    for user in rows:
        past = view.items[view.starts[user] : view.ends[user]]
        scores_I = sum(
            (0.7**age * weights_II[item] for age, item in enumerate(past[::-1][:10])),
            np.zeros(len(weights_II)),
        )
        share_I = scores_I / max(scores_I.sum(), 1e-30)
        logp_UI[user] += weight * np.log((1 - epsilon) * share_I + epsilon / len(share_I))
        logp_UI[user][past] = -np.inf
    return logp_UI


def test_the_control_ranks_all_items_by_the_mixture(
    control: Path, tiny_data: Path, tmp_path: Path
) -> None:
    weight, epsilon = 0.7, 0.3
    words = [
        f"model={control / 'sasrec'}",
        f"weight={weight}",
        f"epsilon={epsilon}",
        "knn.window=2",
    ]
    dataset = load_dataset(tiny_data)
    metrics = run_baseline("sasrec+knn", dataset, "test", tmp_path, settings=words)
    assert (metrics["system"], metrics["recipe"]["weight"], metrics["recipe"]["epsilon"]) == (
        "sasrec+knn",
        weight,
        epsilon,
    )
    assert metrics["recipe"]["sasrec"]["d_model"] == 16
    # As `compare` asks of two seeds of one recipe: what may differ stands on top.
    assert metrics["recipe"]["seed"] == 0
    assert not {"seed", "best_epoch"} & set(metrics["recipe"]["sasrec"])
    graph = {"weight": weight, "epsilon": epsilon, **vars(KnnSettings(window=2))}
    assert metrics["protocol"]["graph"] == graph
    scores_UI = control_scores(control, tiny_data, "test", weight, epsilon)
    targets = dataset.sequences.history_and_target("test").targets
    ranks = (scores_UI >= scores_UI[np.arange(len(targets)), targets][:, None]).sum(1)
    found = metrics_from_histogram(rank_histogram(np.where(ranks <= 20, ranks, 0)))
    assert metrics[NDCG] == pytest.approx(found[NDCG], abs=1e-9)
    listed = pq.read_table(tmp_path / "top20-test.parquet")["items"].to_pylist()
    for items, scores_I in zip(listed, scores_UI, strict=True):
        best = [item for item in np.argsort(-scores_I)[:20] if np.isfinite(scores_I[item])]
        assert items == [dataset.sequences.item_ids[item] for item in best]


def test_the_controls_weights_are_the_best_of_the_grid_on_validation(
    control: Path, tiny_data: Path
) -> None:
    held = json.loads((control / "hybrid.json").read_text())
    targets = load_dataset(tiny_data).sequences.history_and_target("validation").targets
    for item_weight, weight, epsilon, figure in held["table"][::5]:
        scores_UI = control_scores(control, tiny_data, "validation", weight, epsilon)
        ranks = (scores_UI >= scores_UI[np.arange(len(targets)), targets][:, None]).sum(1)
        found = metrics_from_histogram(rank_histogram(np.where(ranks <= 20, ranks, 0)))
        assert item_weight == 0
        assert figure == pytest.approx(found[NDCG], abs=1e-9)
    chosen = (held["mixture"]["graph_weight"], held["mixture"]["epsilon"])
    assert max(held["table"], key=lambda row: row[-1])[1:3] == list(chosen)
    assert held["users"] == len(targets)


def test_a_control_is_made_once(control: Path, tiny_data: Path, tmp_path: Path) -> None:
    """What is there is used again, a trained SASRec of another directory too; weights for something
    else are refused."""
    dataset = load_dataset(tiny_data)
    before = (
        (control / "hybrid.json").stat().st_mtime_ns,
        (control / "sasrec" / "best.safetensors").stat().st_mtime_ns,
    )
    figure = json.loads((control / "metrics-test.json").read_text())[NDCG]
    assert (
        run_baseline("sasrec+knn", dataset, "test", control, settings=["knn.window=2"])[NDCG]
        == figure
    )
    assert before == (
        (control / "hybrid.json").stat().st_mtime_ns,
        (control / "sasrec" / "best.safetensors").stat().st_mtime_ns,
    )
    with pytest.raises(ValueError, match="weights chosen for knn"):
        run_baseline("sasrec+knn", dataset, "test", control, settings=["knn.window=3"])
    alone = run_baseline("sasrec", dataset, "test", control / "sasrec")
    words = [f"model={control / 'sasrec'}", "weight=0"]
    mixed = run_baseline("sasrec+knn", dataset, "test", tmp_path, settings=words)
    assert mixed[NDCG] == alone[NDCG]
    assert mixed["protocol"]["graph"] is None
    assert not (tmp_path / "sasrec").exists()
    with pytest.raises(ValueError, match=r"is trained: leave out sasrec\.d_model=8"):
        run_baseline("sasrec+knn", dataset, "test", tmp_path, settings=[*words, "sasrec.d_model=8"])


def test_a_refit_has_nothing_to_choose_by(tiny_data: Path, tmp_path: Path) -> None:
    dataset = load_dataset(tiny_data)
    with pytest.raises(ValueError, match="give --set weight=W"):
        run_baseline(
            "sasrec+knn", dataset, "test", tmp_path, trained_through="n-1", settings=TINY_SET
        )
    words = [*TINY_SET, "weight=0.2", "epsilon=0.5"]
    found = run_baseline(
        "sasrec+knn", dataset, "test", tmp_path, trained_through="n-1", settings=words
    )
    assert (found["protocol"]["graph"]["weight"], found["protocol"]["trained_through"]) == (
        0.2,
        "n-1",
    )
