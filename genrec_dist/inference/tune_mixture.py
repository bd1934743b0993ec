"""Choosing the weights of a score mixture on validation."""

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
from genrec_dist.inference.rank_users import Decoding, _asked, cut_batches


def tune_mixture(
    run: LoadedRun,
    dataset: Dataset,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> mixture.Choice:
    """The weights of mode `hybrid` with the best NDCG@10 on validation, its users; on rank 0
    written to the run's `hybrid.json`.

    Of `decoding` beam, history exclusion and the graph's settings are used. What the parts say of
    the candidates is computed once and mixed in all ways of the grid. Collective. Raises ValueError
    if training saw the validation targets."""
    ranks = ranks or Ranks()
    ranks.together(partial(check_numbering, run, dataset))
    ranks.together(partial(check_split, run, dataset))
    graph = ranks.together(
        lambda: Graph.of(dataset.sequences, "validation", trained_through, decoding.graph)
    )
    view = dataset.sequences.history_and_target("validation")
    has_head = bool(run.model.config.item_loss)
    tried = mixture.grid(mixture.ITEM_WEIGHTS if has_head else (1.0,), decoding.graph)
    batches = [
        view.users[places_B]
        for places_B in cut_batches((view.ends - view.starts)[view.users], decoding.batch_size)
    ]

    def mine() -> np.ndarray:
        counts_G = np.zeros((len(tried), TOP + 1), np.int64)
        for rows_B in batches[ranks.rank :: ranks.size]:
            asked = _asked(run.searcher, run.layout, view, rows_B, decoding, graph)
            found = run.searcher.candidates(
                asked.encoder,
                beam=max(decoding.beam, TOP),
                excluded=asked.excluded,
                graph_prob_BN=asked.graph_prob_BN,
            )
            targets_B = torch.from_numpy(view.targets[rows_B].astype(np.int64)).to(
                run.searcher.device
            )
            for place, mixed in enumerate(tried):
                counts_G[place] += rank_histogram(_ranks_of(targets_B, found, mixed, run.searcher))
            if on_batch is not None:
                on_batch(len(rows_B))
        return counts_G

    parts = ranks.exchange(ranks.together(mine).flatten().tolist())
    choice = mixture.choose(tried, np.sum(parts, axis=0).reshape(len(tried), -1))
    if ranks.is_main:
        mixture.save(choice, run.path, mixture_origin(dataset, decoding, trained_through))
    return choice


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
    """The decoding with the mixture that was chosen for the run (the defaults where none was, or
    `anew`), changed in what is given.

    `overrides`: `epsilon=value`, or `key=value` of the graph's `KnnSettings`. Raises ValueError for
    what does not fit, and where the chosen weights are of other data, another training or another
    exclusion of the history."""
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


def _ranks_of(
    targets_B: torch.Tensor, found: Candidates, mixed: Mixture, searcher: TrieSearcher
) -> np.ndarray:
    """int64 [B], 1 = first, 0 = none of the first 20: as the lists would have it, ties by node
    included."""
    scores_BC, target_B1 = found.mixed(mixed), targets_B[:, None]
    is_target_BC = found.items_BC == target_B1
    target_score_B1 = scores_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
    nodes_BC, node_B1 = searcher.item_node[found.items_BC], searcher.item_node[target_B1]
    above_BC = (scores_BC > target_score_B1) | (
        (scores_BC == target_score_B1) & (nodes_BC < node_B1)
    )
    ranks_B = above_BC.sum(1) + 1
    listed_B = torch.isfinite(target_score_B1[:, 0]) & (ranks_B <= TOP)
    return ranks_B.masked_fill(~listed_B, 0).cpu().numpy()
