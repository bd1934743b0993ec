"""Soft targets of a recipe or of a control: graph and texts with the settings that validation
chooses."""

from __future__ import annotations

from genrec_shards.dataset import Dataset
from genrec_shards.splits import TrainedThrough

from genrec_dist.baselines.tune_knn import DRAWN, MOST_USERS, ROUNDS, VALUES, tune_knn
from genrec_dist.config.recipe import Distill
from genrec_dist.console import say
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.text.kept_targets import inputs_of, kept_soft_targets
from genrec_dist.text.teacher import make_teacher
from genrec_dist.text.tune import tune_text


def soft_targets_of(
    dataset: Dataset,
    trained_through: TrainedThrough,
    distill: Distill,
    text: str,
    *,
    exclude_history: bool,
) -> Teacher:
    """The soft targets, made where the data directory does not hold them yet.

    Args:
        dataset: Of which the training parts are learned from.
        trained_through: Where these end.
        distill: Weight, temperature and number of items.
        text: Source of the texts that are compared, `none` for the graph alone; data without texts
            has the graph alone too.
        exclude_history: Whether lists leave out the history.
    """
    source = None if dataset.descriptions is None or text == "none" else text

    def make() -> Teacher:
        say(f"{dataset.path}: soft targets of the transition graph, its settings by validation")
        graph = tune_knn(dataset.sequences, exclude_history=exclude_history).settings
        term = None if source is None else tune_text(dataset, source)
        return make_teacher(
            dataset, trained_through, distill, graph, term, exclude_history=exclude_history
        )

    tried = {"values": VALUES, "drawn": DRAWN, "rounds": ROUNDS, "users": MOST_USERS}
    inputs = inputs_of(
        dataset, trained_through, distill, source, tried, exclude_history=exclude_history
    )
    return kept_soft_targets(dataset, inputs, make)
