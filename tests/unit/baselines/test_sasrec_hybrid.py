"""The control: SASRec mixed with the transition graph, against its scores in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare

from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec.model import scored
from genrec_dist.baselines.sasrec.run import Training, open_or_train
from genrec_dist.cli.app import run_command
from genrec_dist.data.item_graph import KnnSettings, neighbour_weights
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram
from genrec_dist.text.similarity import TextSimilarity
from genrec_dist.text.tune import tune_text

NDCG = "NDCG@10"

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
    control: Path | None, data: Path, split: str, weight: float, epsilon: float
) -> np.ndarray:
    """float64 [U, I] of all items, -inf for those of the history, in numpy; None: without a
    model."""
    dataset = load_dataset(data)
    training = Training(dataset, "test", exclude_history=True)
    view = dataset.sequences.history_and_target(split)
    rows = np.arange(len(view.targets))
    logits_UI = np.zeros((len(rows), dataset.sequences.num_items))
    if control is not None:
        model = open_or_train(control / "sasrec", training).model
        parts = [part.numpy() for _, part in scored(model, view, rows, False)]
        logits_UI = np.concatenate(parts).astype(np.float64)
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
    for item_weight, weight, epsilon, _, figure in held["table"][::5]:
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


@pytest.fixture(scope="module")
def described(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data, with texts of two words for most items."""
    folder = tmp_path_factory.mktemp("described")
    plain = load_dataset(tiny_data)
    rows = [
        f"{id_},topic{row % 7} kind{row % 3}" for row, id_ in enumerate(plain.sequences.item_ids)
    ]
    (folder / "items.csv").write_text("\n".join(["item,words", *rows[5:]]) + "\n")
    options = {"numbering": plain.info.numbering, "seed": plain.info.seed}
    prepare(tiny_data, folder / "data", format="data", items=folder / "items.csv", **options)
    return folder / "data"


@pytest.mark.parametrize("name", ["graph+text", "sasrec+graph+text"])
def test_controls_with_texts_rank_all_items_by_the_mixture(
    name: str, control: Path, described: Path, tmp_path: Path
) -> None:
    """Their weights are the best of their table, which test then uses."""
    model = [f"model={control / 'sasrec'}"] if name.startswith("sasrec") else []
    words = ["knn.window=2", *model]
    dataset = load_dataset(described)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "EPSILONS", (0.1, 0.9))
        patch.setattr(mixture, "TEXT_EPSILONS", (0.1, 0.9))
        metrics = run_baseline(name, dataset, "test", tmp_path, settings=words)
    held = json.loads((tmp_path / "hybrid.json").read_text())
    mixed = mixture.load(tmp_path, held["origin"])
    assert mixed is not None
    figures = [*held["table"], *held["text_table"]]
    assert held["validation"][NDCG] == max(row[-1] for row in figures)
    assert metrics["recipe"]["weight"] == mixed.graph_weight
    term, view = tune_text(dataset, "words"), dataset.sequences.history_and_target("validation")
    similarity = TextSimilarity.of(dataset, term)
    assert similarity is not None
    rows = range(len(view.targets))
    pasts = [view.items[view.starts[user] : view.ends[user]] for user in rows]
    text_UI = similarity.probabilities(np.concatenate(pasts), np.cumsum([0, *map(len, pasts)]))
    for weight, text_weight, text_epsilon, figure in held["text_table"][::7]:
        place = control if model else None
        scores_UI = control_scores(place, described, "validation", weight, mixed.epsilon)
        near_UI = (1 - text_epsilon) * text_UI.numpy() + text_epsilon / text_UI.shape[1]
        scores_UI += text_weight * np.log(near_UI)
        ranks = (scores_UI >= scores_UI[rows, view.targets][:, None]).sum(1)
        found = metrics_from_histogram(rank_histogram(np.where(ranks <= 20, ranks, 0)))
        assert figure == pytest.approx(found[NDCG], abs=1e-9)
    again = run_baseline(name, dataset, "test", tmp_path, settings=words)
    assert again[NDCG] == metrics[NDCG]
    assert metrics["system"] == name


def test_controls_with_texts_say_what_they_lack(
    tiny_data: Path, described: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="its items have no texts: prepare it again"):
        run_baseline("graph+text", load_dataset(tiny_data), "test", tmp_path)
    for words, message in (
        (["weight=0.5"], "graph\\+text: weight is chosen on validation"),
        (["sasrec.d_model=8"], "graph\\+text has no model: leave out model and sasrec"),
    ):
        with pytest.raises(ValueError, match=message):
            run_baseline("graph+text", load_dataset(described), "test", tmp_path, settings=words)
