"""What a mixture knows from the history alone: the transition graph, the repeat model and the
texts."""

# B users, N items

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.data.item_graph import Graph
from genrec_dist.data.repeat_model import RepeatModel
from genrec_dist.decoding.rescoring import HistoryProbabilities
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.text.similarity import TextSimilarity


@dataclass(frozen=True)
class HistoryScores:
    """The parts of a mixture that need no model."""

    graph: Graph | None = None
    repeat: RepeatModel | None = None
    """Speaks of the history's items alone; the graph then speaks of all others alone."""
    repeat_counts: bool = True
    """Whether the repeat model has a weight."""
    text: TextSimilarity | None = None
    """Speaks of items outside the history."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        split: Split,
        trained_through: TrainedThrough,
        mixture: Mixture,
    ) -> HistoryScores:
        """Those that have a weight in the mixture.

        Args:
            dataset: Whose training parts the graph is made of, and whose items have the texts.
            split: Whose histories are continued.
            trained_through: The last position that the graph is made of.
            mixture: The weights, and the settings of each part.

        Raises:
            ValueError: If training saw the split's targets, or the mixture takes texts and there
                are none.
        """
        graph = None
        if mixture.graph_weight:
            graph = Graph.of(dataset.sequences, split, trained_through, mixture.graph)
        text = TextSimilarity.of(dataset, mixture.text)
        return cls(graph, mixture.repeat, mixture.repeat_weight > 0, text)

    def probabilities(
        self, items: np.ndarray, offsets: np.ndarray, num_items: int
    ) -> HistoryProbabilities:
        """Of the next item after each history, `items[offsets[b]:offsets[b + 1]]`, oldest first."""
        graph_BN = repeat_BN = text_BN = None
        if self.graph is not None:
            only_new = self.repeat is not None
            graph_BN = self.graph.probabilities(items, offsets, only_new=only_new)
        if self.repeat is not None and self.repeat_counts:
            repeat_BN = self.repeat.probabilities(items, offsets, num_items)
        if self.text is not None:
            text_BN = self.text.probabilities(items, offsets)
        return HistoryProbabilities(graph_BN, repeat_BN, text_BN)
