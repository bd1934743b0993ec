"""Hybrid on real runs: its weights chosen in one pass, and what evaluation says of it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from tiny import TINY_RECIPE

from genrec_dist.baselines.tune_knn import tune_knn
from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.data.item_graph import KnnSettings
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram, target_ranks
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.load import LoadedRun, load_run
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.inference.recommend import Recommender, Request
from genrec_dist.training.run import train

NDCG = "NDCG@10"
WITH_HEAD = [
    "model.item_loss=0.5", "model.encoder_unit=item", "model.id_dim=8",
    "model.decoder_start=state", "validation.decode=hybrid",
]  # fmt: skip


@pytest.fixture(scope="module")
def head_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head")
    (path / "recipe.yaml").write_text(f"data: {tiny_data}\nrun: {path / 'run'}\n{TINY_RECIPE}")
    return train(load_recipe(path / "recipe.yaml", WITH_HEAD))


def ndcg_of(loaded: LoadedRun, data: Path, decoding: Decoding) -> float:
    """Of the lists of all users on validation."""
    sequences = load_dataset(data).sequences
    view = sequences.history_and_target("validation")
    known = HistoryScores.of(load_dataset(data), "validation", "n-2", decoding.mixture)
    found = rank_batch(loaded.searcher, loaded.layout, view, view.users, decoding, known)
    ranks = target_ranks(found.items, view.targets[view.users])
    return metrics_from_histogram(rank_histogram(ranks))[NDCG]


@pytest.mark.parametrize("trained", ["tiny_run", "head_run"])
def test_tune_mixture_chooses_in_one_pass_what_evaluation_finds_best(
    trained: str, tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each mixture's figure equals that of its own lists; the best one is what evaluate then uses
    by default, and names in the protocol."""
    has_head = trained == "head_run"
    run = Path(shutil.copytree(request.getfixturevalue(trained), tmp_path / "run"))
    command = ["evaluate", str(run), "--decode"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "GRAPH_WEIGHTS", (0.0, 0.3, 3.0))
        patch.setattr(mixture, "EPSILONS", (0.1, 0.9))
        patch.setattr(mixture, "ITEM_WEIGHTS", (0.0, 2.0))
        tune = ["hybrid", "--split", "validation", "--tune-weights", "--graph-set", "window=2"]
        assert run_command([*command, *tune]) == 0
    held = json.loads((run / "hybrid.json").read_text())
    assert len(held["table"]) == (2 if has_head else 1) * 5
    assert not (run / "metrics-validation.json").exists()
    loaded = load_run(run)
    base = Decoding(mode="hybrid", batch_size=1000)
    for item_weight, graph_weight, epsilon, repeat_weight, figure in held["table"]:
        assert repeat_weight == 0
        mixed = Mixture(item_weight, graph_weight, epsilon, KnnSettings(window=2))
        decoding = replace(base, mixture=mixed)
        assert ndcg_of(loaded, tiny_data, decoding) == pytest.approx(figure, abs=1e-12)
    figures = {tuple(row[:3]): row[-1] for row in held["table"]}
    chosen = held["mixture"]
    weights = (chosen["item_weight"], chosen["graph_weight"], chosen["epsilon"])
    assert len(set(figures.values())) > 1
    assert figures[weights] == max(figures.values())
    assert chosen["graph"]["window"] == 2

    assert has_head or weights[1], "the graph is to be chosen where there is no item head"
    assert run_command([*command, "hybrid", "--split", "validation"]) == 0
    metrics = json.loads((run / "metrics-validation.json").read_text())
    assert metrics[NDCG] == pytest.approx(figures[weights], abs=1e-12)
    assert metrics["system"] == "genrec, hybrid"
    assert metrics["protocol"]["item_weight"] == (weights[0] if has_head else None)
    graph = {"weight": weights[1], "epsilon": weights[2], **chosen["graph"]}
    assert metrics["protocol"]["graph"] == (graph if weights[1] else None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epsiln=0.5", "knn: unknown key epsiln; did you mean `epsilon`?"),
        ("width=3", "knn: unknown key width; known here: epsilon, window, forward"),
    ],
)
def test_a_mistyped_setting_of_the_graph_is_answered_with_what_was_meant(
    setting: str, message: str, tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(tiny_run), "--decode", "hybrid", "--graph-set", setting]
    assert run_command(words) == 1
    assert message in capfd.readouterr().err


@pytest.fixture(scope="module")
def repeating_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of users who take their own items again half of the time."""
    path = tmp_path_factory.mktemp("repeating")
    dice, lines = random.Random(3), []
    for user in range(120):
        row = [f"B{dice.randrange(40):02}" for _ in range(3)]
        for _ in range(9):
            again = dice.random() < 0.5
            row.append(dice.choice(row[-3:]) if again else f"B{dice.randrange(40):02}")
        lines.append(" ".join([f"user-{user}", *row]))
    (path / "log.txt").write_text("\n".join(lines) + "\n")
    write_shards(prepare(path / "log.txt", path / "data"), path / "data" / "shards")
    (path / "recipe.yaml").write_text(f"data: {path / 'data'}\nrun: {path / 'run'}\n{TINY_RECIPE}")
    return train(load_recipe(path / "recipe.yaml"))


def test_repeats_are_mixed_in_as_lists_and_requests_have_them(
    repeating_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Where lists may repeat the history a repeat model takes part: figures are those of the lists,
    a repeated item is listed first, and evaluate chooses the weights by itself."""
    run = Path(shutil.copytree(repeating_run, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "GRAPH_WEIGHTS", (0.0, 0.6))
        patch.setattr(mixture, "EPSILONS", (0.5,))
        patch.setattr(mixture, "REPEAT_WEIGHTS", (0.0, 1.0, 3.0))
        assert run_command(["evaluate", str(run), "--decode", "hybrid"]) == 0
        assert "hybrid's weights, chosen on validation of 6 mixtures" in capsys.readouterr().out
    held = json.loads((run / "hybrid.json").read_text())
    data, loaded = repeating_run.parent / "data", load_run(run)
    best = mixture.load(run, held["origin"])
    assert best is not None
    assert best.repeat is not None
    assert best.repeat_weight > 0
    sequences = load_dataset(data).sequences
    assert best.graph == tune_knn(sequences, exclude_history=True).settings
    known = HistoryScores.of(load_dataset(data), "test", "n-2", replace(best, graph_weight=1.0))
    prob = known.probabilities(np.array([3, 5, 3]), np.array([0, 3]), sequences.num_items)
    assert prob.graph is not None
    assert prob.repeat is not None
    assert not prob.graph[0, [3, 5]].any(), "the graph speaks of new items alone"
    assert prob.graph.sum() == pytest.approx(1)
    for item_weight, graph_weight, epsilon, repeat_weight, figure in held["table"]:
        mixed = Mixture(item_weight, graph_weight, epsilon, best.graph, repeat_weight, best.repeat)
        decoding = Decoding(mode="hybrid", batch_size=1000, exclude_history=False, mixture=mixed)
        assert ndcg_of(loaded, data, decoding) == pytest.approx(figure, abs=1e-12)
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert metrics["protocol"]["graph"]["repeat_weight"] == best.repeat_weight

    listed = pq.read_table(run / "top20-test.parquet").to_pylist()
    request = Request(history_of(data, 7), "user-7")
    (answer,) = Recommender.load(run, mode="hybrid").recommend([request], k=20)
    assert answer.items == listed[7]["items"]
    assert answer.items[0] in request.history
    (by_decoder,) = Recommender.load(run).recommend([request], k=20)
    assert answer.items != by_decoder.items
    (run / "hybrid.json").unlink()
    with pytest.raises(ValueError, match="no weights of hybrid were chosen yet"):
        Recommender.load(run, mode="hybrid")


@pytest.fixture(scope="module")
def described_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with texts that name the topic of most items, under the same codes."""
    folder = tmp_path_factory.mktemp("described")
    plain = load_dataset(tiny_data)
    rows = [f"{id_},topic{row % 7} word{row}" for row, id_ in enumerate(plain.sequences.item_ids)]
    (folder / "items.csv").write_text("\n".join(["item,words", *rows[5:]]) + "\n")
    options = {"numbering": plain.info.numbering, "seed": plain.info.seed}
    prepare(tiny_data, folder / "data", format="data", items=folder / "items.csv", **options)
    return folder / "data"


def test_texts_are_mixed_in_where_the_data_has_them(
    tiny_run: Path, tiny_data: Path, described_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Figures are those of the lists; evaluate, recommend and hybrid.json agree; without texts, or
    with source none, all is as it was; other texts are refused."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    command = ["evaluate", str(run), "--decode", "hybrid", "--split", "validation", "--data"]
    tune = ["--tune-weights", "--graph-set", "window=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "GRAPH_WEIGHTS", (0.0, 0.3, 3.0))
        patch.setattr(mixture, "EPSILONS", (0.1,))
        patch.setattr(mixture, "TEXT_WEIGHTS", (0.5, 3.0))
        patch.setattr(mixture, "TEXT_EPSILONS", (0.1, 0.9))
        assert run_command([*command, str(tiny_data), *tune]) == 0
        plain = (run / "hybrid.json").read_bytes()
        assert b"text" not in plain
        assert run_command([*command, str(described_data), *tune, "--text", "none"]) == 0
        without = json.loads((run / "hybrid.json").read_text())
        assert len(without["origin"].pop("texts_hash")) == 64
        assert without == json.loads(plain)
        assert run_command([*command, str(described_data), *tune]) == 0
    held = json.loads((run / "hybrid.json").read_text())
    assert held["table"] == without["table"]
    best = mixture.load(run, held["origin"])
    assert best is not None
    assert best.text is not None, "of a model of few steps the texts help by chance"
    loaded = load_run(run)
    for graph_weight, weight, epsilon, figure in held["text_table"]:
        term = replace(best.text, weight=weight, epsilon=epsilon)
        decoding = Decoding(
            mode="hybrid", mixture=replace(best, graph_weight=graph_weight, text=term)
        )
        assert ndcg_of(loaded, described_data, decoding) == pytest.approx(figure, abs=1e-12)
    assert held["validation"][NDCG] == max(row[-1] for row in held["text_table"])

    words = ["evaluate", str(run), "--decode", "hybrid", "--data", str(described_data)]
    assert run_command(words) == 0
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert metrics["protocol"]["graph"]["text"] == held["mixture"]["text"]
    listed = pq.read_table(run / "top20-test.parquet").to_pylist()
    request = Request(history_of(described_data, 7), "user-7")
    recommender = Recommender.load(run, mode="hybrid", data=described_data)
    (answer,) = recommender.recommend([request], k=20)
    assert answer.items == listed[7]["items"]
    capsys.readouterr()
    assert run_command([*command[:-1], "--data", str(tiny_data)]) == 1
    assert "its items have no texts: prepare it again with --items" in capsys.readouterr().err
    given = [
        "--graph-weight",
        "0",
        "--graph-set",
        "text.weight=0.7",
        "--graph-set",
        "text.recent=2",
    ]
    assert run_command([*words, *given]) == 0
    protocol = json.loads((run / "metrics-test.json").read_text())["protocol"]
    term = {**held["mixture"]["text"], "weight": 0.7, "recent": 2}
    assert (protocol["graph"]["weight"], protocol["graph"]["text"]) == (0.0, term)
    assert run_command([*command, str(described_data), *tune, *given]) == 2
    assert "leave out --graph-set text." in capsys.readouterr().err
    held["origin"]["texts_hash"] = "of others"
    (run / "hybrid.json").write_text(json.dumps(held))
    assert run_command([*command, str(described_data)]) == 1
    assert "hybrid.json: weights chosen for texts_hash of others" in capsys.readouterr().err
    assert run_command([*words, "--text", "none"]) == 2
    assert "--text goes with --tune-weights" in capsys.readouterr().err


def history_of(data: Path, user: int) -> list[str]:
    """Before the test item."""
    sequences = load_dataset(data).sequences
    begin, end = sequences.offsets[user], sequences.offsets[user + 1] - 1
    return [sequences.item_ids[item] for item in sequences.items[begin:end]]


def test_run_with_an_item_head_is_loaded_and_evaluated_by_it(
    head_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """By the command itself: a row of its own, and its weight in the protocol."""
    run = Path(shutil.copytree(head_run, tmp_path / "run"))
    loaded = load_run(run)
    assert loaded.model.config.item_loss == 0.5
    assert loaded.layout.unit == "item"
    assert loaded.model.item_projection is not None
    view = load_dataset(tiny_data).sequences.history_and_target("test")
    decoding = Decoding(mode="hybrid")
    lists = rank_batch(loaded.searcher, loaded.layout, view, np.arange(20), decoding)
    assert (lists.items >= 0).all()
    for mode, system, weight in (
        ("hybrid", "genrec, hybrid", 0.25),
        ("items", "genrec, item head", None),
    ):
        assert run_command(["evaluate", str(run), "--decode", mode, "--item-weight", "0.25"]) == 0
        found = json.loads((run / "metrics-test.json").read_text())
        protocol = found["protocol"]
        assert (found["system"], protocol["decode"]) == (system, mode)
        assert protocol["item_weight"] == weight


def test_evaluate_refuses_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, message in [
        (["--tune-weights", "--decode", "hybrid"], "--tune-weights goes with"),
        (["--graph-weight", "0.5"], "--decode exact has no graph"),
    ]:
        assert run_command(["evaluate", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
