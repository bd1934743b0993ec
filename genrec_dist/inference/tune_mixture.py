"""Choosing the weights of a score mixture on validation."""

# B users of a batch, C candidates, G mixtures of the grid

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.splits import TrainedThrough

from genrec_dist.data.item_graph import Graph
from genrec_dist.decoding.rescoring import Candidates
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import TOP, rank_histogram
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.load import LoadedRun, check_numbering, check_split
from genrec_dist.inference.rank_users import Decoding, cut_batches, encode_batch


def tune_mixture(
    run: LoadedRun,
    dataset: Dataset,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> mixture.Choice:
    """Choose the weights of mode `hybrid` with the best NDCG@10 on validation, and on rank 0 write
    them to the run's `hybrid.json`. Collective.

    The candidates and their scores by each part are computed once and mixed in all ways of the
    grid.

    Args:
        run: The model.
        dataset: The data directory it was trained on.
        decoding: Of which beam, history exclusion and the graph's settings are used.
        trained_through: The last item of each user that training saw.
        ranks: Who shares the work; None: this process alone.
        on_batch: Called with the number of users of each batch of this rank.

    Raises:
        ValueError: Training saw the validation targets, or the data is not the run's.
    """
    ranks = ranks or Ranks()
    ranks.run_on_all(partial(check_numbering, run, dataset))
    ranks.run_on_all(partial(check_split, run, dataset))
    graph = ranks.run_on_all(
        lambda: Graph.of(dataset.sequences, "validation", trained_through, decoding.graph)
    )
    view, searcher = dataset.sequences.history_and_target("validation"), run.searcher
    has_head = bool(run.model.config.item_loss)
    grid = mixture.grid(mixture.ITEM_WEIGHTS if has_head else (1.0,), decoding.graph)
    batches = cut_batches((view.ends - view.starts)[view.users], decoding.batch_size)

    def count_ranks() -> np.ndarray:
        counts_G = np.zeros((len(grid), TOP + 1), np.int64)
        for places_B in batches[ranks.rank :: ranks.size]:
            rows_B = view.users[places_B]
            batch = encode_batch(searcher, run.layout, view, rows_B, decoding, graph)
            found = searcher.candidates(
                batch.encoder,
                beam=max(decoding.beam, TOP),
                excluded=batch.excluded,
                graph_prob_BN=batch.graph_prob_BN,
            )
            targets_B = torch.from_numpy(view.targets[rows_B].astype(np.int64))
            targets_B = targets_B.to(searcher.device)
            for place, mixed in enumerate(grid):
                counts_G[place] += rank_histogram(_target_ranks(targets_B, found, mixed, searcher))
            if on_batch is not None:
                on_batch(len(rows_B))
        return counts_G

    counts = ranks.exchange(ranks.run_on_all(count_ranks).flatten().tolist())
    choice = mixture.choose(grid, np.sum(counts, axis=0).reshape(len(grid), -1))
    if ranks.is_main:
        mixture.save(choice, run.path, mixture_origin(dataset, decoding, trained_through))
    return choice


def _target_ranks(
    targets_B: torch.Tensor, found: Candidates, mixed: Mixture, searcher: TrieSearcher
) -> np.ndarray:
    """int64 [B], 1 = first, 0 = none of the first 20: as the lists would have it, ties by node
    included."""
    scores_BC, target_B1 = found.mix_scores(mixed), targets_B[:, None]
    is_target_BC = found.items_BC == target_B1
    target_score_B1 = scores_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
    nodes_BC, node_B1 = searcher.item_node[found.items_BC], searcher.item_node[target_B1]
    tied_BC = scores_BC == target_score_B1
    above_BC = (scores_BC > target_score_B1) | (tied_BC & (nodes_BC < node_B1))
    ranks_B = above_BC.sum(1) + 1
    listed_B = torch.isfinite(target_score_B1[:, 0]) & (ranks_B <= TOP)
    return ranks_B.masked_fill(~listed_B, 0).cpu().numpy()


def mixture_origin(
    dataset: Dataset, decoding: Decoding, trained_through: TrainedThrough
) -> dict[str, Any]:
    """What chosen weights are good for."""
    return {
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": decoding.exclude_history,
    }


def mixed_decoding(
    run: LoadedRun,
    dataset: Dataset,
    decoding: Decoding,
    trained_through: TrainedThrough,
    *,
    item_weight: float | None = None,
    graph_weight: float | None = None,
    overrides: list[str] | None = None,
    anew: bool = False,
) -> Decoding:
    """The decoding with the mixture that was chosen for the run, changed in what is given.

    Args:
        run: Whose `hybrid.json` is read; without one the defaults are taken.
        dataset: The data directory.
        decoding: What is changed.
        trained_through: The last item of each user that training saw.
        item_weight: Of the item head; None: as chosen.
        graph_weight: Of the graph; None: as chosen.
        overrides: `epsilon=value`, or `key=value` of the graph's `KnnSettings`.
        anew: Take the defaults whatever was chosen.

    Raises:
        ValueError: What does not fit, and where the chosen weights are of other data, another
            training or another exclusion of the history.
    """
    origin = mixture_origin(dataset, decoding, trained_through)
    chosen = (None if anew else mixture.load(run.path, origin)) or Mixture()
    mixed = mixture.changed(chosen, item_weight, graph_weight, overrides)
    return replace(
        decoding,
        item_weight=mixed.item_weight,
        graph_weight=mixed.graph_weight,
        epsilon=mixed.epsilon,
        graph=mixed.graph,
    )
