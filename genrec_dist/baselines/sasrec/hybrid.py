"""SASRec mixed with co-occurrence kNN: the control of GenRec's hybrid, by the same formula and the
same grid."""

# U users, B users of a batch, I items, N list, G mixtures of a grid

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import SplitView, flat_ranges, offsets_of
from genrec_shards.splits import Split
from torch import Tensor

from genrec_dist.baselines.sasrec.model import SASRec, listed, scored
from genrec_dist.baselines.sasrec.run import SasrecRun, Training, open_or_train
from genrec_dist.baselines.tune_knn import tune_knn
from genrec_dist.config.load import section_from
from genrec_dist.data.item_graph import Graph, KnnSettings, log_near
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import TOP, rank_histogram
from genrec_dist.evaluation.ranked_lists import Lists, Rule
from genrec_dist.evaluation.score_mixture import Mixture

MODEL = "sasrec"
"""Directory of the model in the control's directory."""


@dataclass(frozen=True)
class ControlSettings:
    """What `--set` may change."""

    model: str = ""
    """A finished run of `genrec baseline sasrec`; empty: `sasrec` in the control's own directory,
    trained where it is missing."""
    weight: float = -1.0
    """Of kNN's log share; below 0, weight and epsilon are chosen on validation."""
    epsilon: float = 0.1
    """As in `Mixture`."""
    sasrec: dict[str, Any] = field(default_factory=dict)
    """Settings of the model that is trained."""
    knn: KnnSettings = field(default_factory=KnnSettings)
    tune_knn: bool = False
    """Choose kNN's settings on validation too, as `genrec train auto` does."""


@dataclass(frozen=True)
class Control:
    """A model, a graph and how they are mixed."""

    run: SasrecRun
    graph: Graph
    mixture: Mixture

    @property
    def recipe(self) -> dict[str, Any]:
        """The `recipe` of the metrics; two seeds of one recipe may differ in its seed and the epoch
        that was kept."""
        mixed, model = self.mixture, dict(self.run.recipe)
        own = {key: model.pop(key) for key in ("seed", "best_epoch")}
        knn = dataclasses.asdict(mixed.graph)
        return {
            **own,
            "sasrec": model,
            "knn": knn,
            "weight": mixed.graph_weight,
            "epsilon": mixed.epsilon,
        }


def open_or_make(out: Path, training: Training, overrides: list[str] | None = None) -> Control:
    """The control in `out`: its model is trained and its weights are chosen on validation where
    that has not been done.

    An item's score is SASRec's log-softmax over all items + weight log((1 - epsilon) share +
    epsilon / I), `Mixture`'s formula without an item head; the share is the item's part of the
    history's kNN scores.

    Args:
        out: Directory of the control.
        training: Of its model.
        overrides: `key=value` of `ControlSettings`.

    Raises:
        ValueError: For settings that do not fit, and through n-1, where nothing is left to choose
            by, for weights that are neither given nor chosen.
    """
    of_model = [
        text.removeprefix("sasrec.") for text in overrides or [] if text.startswith("sasrec.")
    ]
    others = [text for text in overrides or [] if not text.startswith("sasrec.")]
    settings = section_from(ControlSettings, {}, others, "sasrec+knn")
    if settings.model and of_model:
        raise ValueError(
            f"sasrec+knn: model {settings.model} is trained: leave out sasrec.{of_model[0]}"
        )
    # For test the model is trained on the same parts; its weights are chosen on validation.
    run = open_or_train(Path(settings.model) if settings.model else out / MODEL, training, of_model)
    dataset, trained_through = training.dataset, training.trained_through
    knn = settings.knn
    if settings.tune_knn:
        knn = tune_knn(
            dataset.sequences,
            exclude_history=training.exclude_history,
            trained_through=trained_through,
        ).settings
    graph = Graph.of(dataset.sequences, training.split, trained_through, knn)
    if settings.weight >= 0:
        return Control(run, graph, Mixture(0.0, settings.weight, settings.epsilon, knn))
    origin = {
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": training.exclude_history,
        "model": run.digest(),
        "knn": dataclasses.asdict(knn),
    }
    chosen = mixture.load(out, origin)
    if chosen is None:
        if trained_through == "n-1":
            raise ValueError(
                "trained_through n-1 leaves nothing to choose a weight by: give --set weight=W "
                "--set epsilon=E of the n-2 control"
            )
        choice = choose(run.model, graph, dataset, training.exclude_history)
        out.mkdir(parents=True, exist_ok=True)
        mixture.save(choice, out, origin)
        chosen = choice.mixture
    return Control(run, graph, chosen)


def choose(model: SASRec, graph: Graph, dataset: Dataset, exclude_history: bool) -> mixture.Choice:
    """The weights with the best NDCG@10 on validation, all users, all items ranked."""
    view = dataset.sequences.history_and_target("validation")
    tried = mixture.grid((0.0,), graph.settings)
    counts_G = np.zeros((len(tried), TOP + 1), np.int64)
    for rows_B, logp_BI in _log_probabilities(model, view, view.users, exclude_history):
        shares_BI = _shares(graph, view, rows_B)
        targets_B1 = torch.from_numpy(view.targets[rows_B].astype(np.int64))[:, None]
        near = {
            epsilon: log_near(shares_BI, epsilon, graph.num_items) for epsilon in mixture.EPSILONS
        }
        for place, mixed in enumerate(tried):
            scores_BI = torch.add(logp_BI, near[mixed.epsilon], alpha=mixed.graph_weight)
            # Ties rank above the target.
            ranks_B = (scores_BI >= scores_BI.gather(1, targets_B1)).sum(1).numpy()
            counts_G[place] += rank_histogram(np.where(ranks_B <= TOP, ranks_B, 0))
    return mixture.choose(tried, counts_G)


def rule_of(control: Control, dataset: Dataset, split: Split, *, exclude_history: bool) -> Rule:
    """Top lists of all items' mixed scores."""
    view = dataset.sequences.history_and_target(split)
    graph, mixed = control.graph, control.mixture

    def mixed_scores(users: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        model = control.run.model
        for rows_B, logp_BI in _log_probabilities(model, view, users, exclude_history):
            near_BI = log_near(_shares(graph, view, rows_B), mixed.epsilon, graph.num_items)
            yield rows_B, logp_BI.add_(near_BI, alpha=mixed.graph_weight)

    def lists(users: np.ndarray) -> Lists:
        return listed(mixed_scores(users), len(users), graph.num_items)

    return lists


def _log_probabilities(
    model: SASRec, view: SplitView, users: np.ndarray, exclude_history: bool
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(user rows, log-probabilities float32 [B, I]) of what may be listed. Another normaliser than
    that over all items would move all scores of a user alike."""
    for rows_B, scores_BI in scored(model, view, users, exclude_history):
        yield rows_B, scores_BI.log_softmax(1)


def _shares(graph: Graph, view: SplitView, rows_B: np.ndarray) -> Tensor:
    starts, lengths = view.starts[rows_B], (view.ends - view.starts)[rows_B]
    items = view.items[flat_ranges(starts, lengths)]
    return graph.probabilities(items, offsets_of(lengths)).float()
