"""Controls of GenRec's hybrid by the same formula and the same grid: SASRec mixed with
co-occurrence kNN and with the items' texts, and these two alone."""

# U users, B users of a batch, I items, N list, G mixtures of a grid

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.histories import windows
from genrec_shards.sequences import SplitView, flat_ranges, offsets_of
from genrec_shards.splits import Split
from torch import Tensor

from genrec_dist.baselines.sasrec.model import SCORES_AT_ONCE, listed, scored, taken_places
from genrec_dist.baselines.sasrec.run import SasrecRun, Training, open_or_train
from genrec_dist.baselines.tune_knn import tune_knn
from genrec_dist.config.load import section_from
from genrec_dist.data.item_graph import Graph, KnnSettings, log_near
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import TOP, rank_histogram
from genrec_dist.evaluation.ranked_lists import Lists, Rule
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.text.similarity import TextSimilarity
from genrec_dist.text.tune import tune_text
from genrec_dist.text.vectors import described

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
    knn: KnnSettings = field(default_factory=KnnSettings)
    tune_knn: bool = False
    """Choose kNN's settings on validation too, as `genrec train auto` does; controls with texts
    do so unless a `knn.` is given."""
    text: str = "words"
    """Source of the texts, as in a recipe, of what is mixed with them."""


@dataclass(frozen=True)
class Control:
    """What is mixed, and how."""

    run: SasrecRun | None
    """None of `graph+text`."""
    graph: Graph
    text: TextSimilarity | None
    mixture: Mixture

    @property
    def recipe(self) -> dict[str, Any]:
        """The `recipe` of the metrics; two seeds of one recipe may differ in its seed and the epoch
        that was kept."""
        mixed, own = self.mixture, dict[str, Any]()
        if self.run is not None:
            model = dict(self.run.recipe)
            own = {key: model.pop(key) for key in ("seed", "best_epoch")}
            own["sasrec"] = model
        knn = dataclasses.asdict(mixed.graph)
        text = {} if mixed.text is None else {"text": dataclasses.asdict(mixed.text)}
        return {
            **own,
            "knn": knn,
            "weight": mixed.graph_weight,
            "epsilon": mixed.epsilon,
            **text,
        }


def open_or_make(
    name: str, out: Path, training: Training, overrides: list[str] | None = None
) -> Control:
    """The control in `out`: its model is trained and its weights are chosen on validation where
    that has not been done.

    An item's score is SASRec's log-softmax over all items + weight log((1 - epsilon) share +
    epsilon / I) + the text term, `Mixture`'s formula without an item head; the share is the item's
    part of the history's kNN scores. Without a model the first term is 0 and the weight 1.

    Args:
        name: Of `registry.CONTROLS`.
        out: Directory of the control.
        training: Of its model.
        overrides: `key=value` of `ControlSettings`.

    Raises:
        ValueError: For settings that do not fit, and through n-1, where nothing is left to choose
            by, for weights that are neither given nor chosen; for texts that are not there.
    """
    has_model, with_text = name.startswith("sasrec"), name.endswith("+text")
    of_model = [
        text.removeprefix("sasrec.") for text in overrides or [] if text.startswith("sasrec.")
    ]
    others = [text for text in overrides or [] if not text.startswith("sasrec.")]
    settings = section_from(ControlSettings, {}, others, name)
    if not has_model and (settings.model or of_model):
        raise ValueError(f"{name} has no model: leave out model and sasrec.")
    if with_text and settings.weight >= 0:
        raise ValueError(f"{name}: weight is chosen on validation: leave it out")
    if settings.model and of_model:
        raise ValueError(
            f"{name}: model {settings.model} is trained: leave out sasrec.{of_model[0]}"
        )
    dataset, trained_through = training.dataset, training.trained_through
    texts = described(dataset) if with_text else None
    run = None
    if has_model:
        # For test the model is trained on the same parts; its weights are chosen on validation.
        place = Path(settings.model) if settings.model else out / MODEL
        run = open_or_train(place, training, of_model)
    knn = settings.knn
    if trained_through == "n-1" and settings.weight < 0:
        given = "give --set weight=W --set epsilon=E of the n-2 control"
        raise ValueError(
            "trained_through n-1 leaves nothing to choose a weight by: "
            f"{'use n-2' if with_text else given}"
        )
    given_knn = any(text.startswith("knn.") for text in others)
    if settings.tune_knn or (with_text and not given_knn):
        knn = tune_knn(
            dataset.sequences,
            exclude_history=training.exclude_history,
            trained_through=trained_through,
        ).settings
    graph = Graph.of(dataset.sequences, training.split, trained_through, knn)
    if settings.weight >= 0:
        mixed = Mixture(0.0, settings.weight, settings.epsilon, knn)
        return Control(run, graph, None, mixed)
    origin = {
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": training.exclude_history,
        "model": None if run is None else run.digest(),
        "knn": dataclasses.asdict(knn),
        **({} if texts is None else {mixture.TEXTS: texts.texts_hash, "text": settings.text}),
    }
    chosen = mixture.load(out, origin)
    if chosen is None:
        term = tune_text(dataset, settings.text) if with_text else None
        control = Control(run, graph, TextSimilarity.of(dataset, term), Mixture(graph=knn))
        choice = choose(control, dataset, training.exclude_history)
        out.mkdir(parents=True, exist_ok=True)
        mixture.save(choice, out, origin)
        chosen = choice.mixture
    return Control(run, graph, TextSimilarity.of(dataset, chosen.text), chosen)


def choose(control: Control, dataset: Dataset, exclude_history: bool) -> mixture.Choice:
    """The weights with the best NDCG@10 on validation, all users, all items ranked."""
    histograms = partial(_histograms, control, dataset, exclude_history)
    if control.run is None:  # of the graph alone neither weight nor epsilon changes a rank
        assert control.text is not None
        alone = Mixture(0.0, 1.0, graph=control.graph.settings)
        tried = mixture.text_grid(alone, control.text.term, (1.0,))
        counts_G = histograms(tried)
        choice = mixture.choose(tried[:1], counts_G[:1])
        return mixture.choose_with_text(choice, tried, counts_G)
    tried = mixture.grid((0.0,), control.graph.settings)
    choice = mixture.choose(tried, histograms(tried))
    if control.text is not None:
        tried = mixture.text_grid(choice.mixture, control.text.term)
        choice = mixture.choose_with_text(choice, tried, histograms(tried))
    return choice


def _histograms(
    control: Control, dataset: Dataset, exclude_history: bool, tried: list[Mixture]
) -> np.ndarray:
    """int64 [G, 21] of the validation targets' ranks under each mixture.

    Every score rises with each of its parts. So an item that is below the target in all parts
    never ranks above it, and a target with 20 items above it in all parts is never listed; neither
    is mixed. Of parts (3, 1), target (2, 2) and (1, 1), the first alone is mixed beside the
    target."""
    view = dataset.sequences.history_and_target("validation")
    num_items = control.graph.num_items
    counts_G = np.zeros((len(tried), TOP + 1), np.int64)
    for rows_B, logp_BI in _log_probabilities(control, view, view.users, exclude_history):
        parts = [logp_BI, *_shares(control, view, rows_B)]
        targets_B1 = torch.from_numpy(view.targets[rows_B].astype(np.int64))[:, None]
        at_least = [part_BI >= part_BI.gather(1, targets_B1) for part_BI in parts]
        above_BI = torch.stack(at_least).all(0)
        # Without a model the first part is the same for all items.
        any_above_BI = torch.stack(at_least[control.run is None :]).any(0)
        open_B1 = above_BI.sum(1, keepdim=True) <= TOP  # the target itself is one of them
        counts_G[:, 0] += int((~open_B1).sum())
        owner_E, items_E = torch.nonzero(any_above_BI & open_B1, as_tuple=True)
        is_target_E = items_E == targets_B1[owner_E, 0]
        logp_E, graph_E, *texts = (part_BI[owner_E, items_E] for part_BI in parts)
        users, place_E = np.unique(owner_E.numpy(), return_inverse=True)
        for place, mixed in enumerate(tried):
            near_E = log_near(graph_E, mixed.epsilon, num_items)
            scores_E = torch.add(logp_E, near_E, alpha=mixed.graph_weight)
            if mixed.text is not None:
                near_E = log_near(texts[0], mixed.text.epsilon, num_items)
                scores_E.add_(near_E, alpha=mixed.text.weight)
            # Ties rank above the target.
            reached_E = (scores_E >= scores_E[is_target_E][place_E]).numpy()
            ranks_U = np.bincount(place_E, reached_E, len(users)).astype(np.int64)
            counts_G[place] += rank_histogram(np.where(ranks_U <= TOP, ranks_U, 0))
    return counts_G


def rule_of(control: Control, dataset: Dataset, split: Split, *, exclude_history: bool) -> Rule:
    """Top lists of all items' mixed scores."""
    view = dataset.sequences.history_and_target(split)
    num_items, mixed = control.graph.num_items, control.mixture

    def mixed_scores(users: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows_B, logp_BI in _log_probabilities(control, view, users, exclude_history):
            graph_BI, *texts = _shares(control, view, rows_B)
            logp_BI.add_(log_near(graph_BI, mixed.epsilon, num_items), alpha=mixed.graph_weight)
            if mixed.text is not None:
                near_BI = log_near(texts[0], mixed.text.epsilon, num_items)
                logp_BI.add_(near_BI, alpha=mixed.text.weight)
            yield rows_B, logp_BI

    def lists(users: np.ndarray) -> Lists:
        return listed(mixed_scores(users), len(users), num_items)

    return lists


def _log_probabilities(
    control: Control, view: SplitView, users: np.ndarray, exclude_history: bool
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(user rows, log-probabilities float32 [B, I]) of what may be listed, -inf for what may not.
    Another normaliser than that over all items would move all scores of a user alike; without a
    model all items have one score."""
    if control.run is not None:
        for rows_B, scores_BI in scored(control.run.model, view, users, exclude_history):
            yield rows_B, scores_BI.log_softmax(1)
        return
    num_items = control.graph.num_items
    for rows_B in windows(users, max(1, SCORES_AT_ONCE // num_items)):
        scores_BI = torch.zeros(len(rows_B), num_items)
        if exclude_history:
            scores_BI[taken_places(view, rows_B)] = float("-inf")
        yield rows_B, scores_BI


def _shares(control: Control, view: SplitView, rows_B: np.ndarray) -> list[Tensor]:
    """float32 [B, I] of the graph and, where there are any, of the texts."""
    starts, lengths = view.starts[rows_B], (view.ends - view.starts)[rows_B]
    items, offsets = view.items[flat_ranges(starts, lengths)], offsets_of(lengths)
    known = (control.graph, control.text)
    return [part.probabilities(items, offsets).float() for part in known if part is not None]
