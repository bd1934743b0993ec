"""Choosing the weights of a score mixture on validation."""

# B users of a batch, C candidates, G mixtures of the grid

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.splits import TrainedThrough

from genrec_dist.baselines.tune_knn import tune_knn
from genrec_dist.config.load import section_from
from genrec_dist.config.paths import is_pushed
from genrec_dist.data.item_graph import Graph
from genrec_dist.data.repeat_model import fit_repeats
from genrec_dist.decoding.rescoring import Candidates
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import TOP, rank_histogram
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.load import LoadedRun, check_numbering, check_split
from genrec_dist.inference.rank_users import Decoding, cut_batches, encode_batch
from genrec_dist.text.similarity import TextSimilarity
from genrec_dist.text.tune import tune_text

NO_TEXT = "none"
"""In place of a source of texts."""


def tune_mixture(
    run: LoadedRun,
    dataset: Dataset,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    tune_graph: bool = False,
    text: str = "words",
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> mixture.Choice:
    """Choose the weights of mode `hybrid` with the best NDCG@10 on validation, and on rank 0 write
    them to the run's `hybrid.json`. Collective.

    The candidates and their scores by each part are computed once and mixed in all ways of the
    grid. Where lists may repeat the history, a repeat model is fitted and takes part. Where the
    items have texts, candidates are computed once more with theirs, and a text term is added to
    the best mixture if that is better still.

    Args:
        run: The model.
        dataset: The data directory it was trained on.
        decoding: Of which beam, history exclusion and the graph's settings are used.
        trained_through: The last item of each user that training saw.
        tune_graph: Choose the graph's settings too, by kNN's own NDCG@10 on validation.
        text: The source of the text term, as of `TextTerm`; `none`: no such term.
        ranks: Who shares the work; None: this process alone.
        on_batch: Called with the number of users of each batch of this rank.

    Raises:
        ValueError: Training saw the validation targets, or the data is not the run's.
    """
    ranks = ranks or Ranks()
    ranks.run_on_all(partial(check_numbering, run, dataset))
    ranks.run_on_all(partial(check_split, run, dataset))
    ranks.run_on_all(partial(_check_not_pushed, run.path))
    parts = _same_on_all(
        ranks, lambda: _history_parts(dataset, decoding, trained_through, tune_graph, text)
    )
    history_scores = ranks.run_on_all(
        lambda: HistoryScores(
            Graph.of(dataset.sequences, "validation", trained_through, parts.graph), parts.repeat
        )
    )
    view, searcher = dataset.sequences.history_and_target("validation"), run.searcher
    has_head = bool(run.model.config.item_loss)
    grid = mixture.grid(
        mixture.ITEM_WEIGHTS if has_head else (1.0,), parts.graph, repeat=parts.repeat
    )
    batches = cut_batches((view.ends - view.starts)[view.users], decoding.batch_size)

    def count_ranks(grid: list[Mixture], history_scores: HistoryScores) -> np.ndarray:
        """int64 [G, 21] of this rank's batches."""
        counts_G = np.zeros((len(grid), TOP + 1), np.int64)
        for places_B in batches[ranks.rank :: ranks.size]:
            rows_B = view.users[places_B]
            batch = encode_batch(searcher, run.layout, view, rows_B, decoding, history_scores)
            beam = max(decoding.beam, TOP)
            found = searcher.candidates(
                batch.encoder, beam=beam, excluded=batch.excluded, known=batch.known
            )
            targets_B = torch.from_numpy(view.targets[rows_B].astype(np.int64))
            targets_B = targets_B.to(searcher.device)
            for place, mixed in enumerate(grid):
                counts_G[place] += rank_histogram(_target_ranks(targets_B, found, mixed, searcher))
            if on_batch is not None:
                on_batch(len(rows_B))
        return counts_G

    def histograms(grid: list[Mixture], history_scores: HistoryScores) -> np.ndarray:
        """int64 [G, 21] of all ranks. Collective."""
        counts_G = ranks.run_on_all(partial(count_ranks, grid, history_scores))
        counts = ranks.exchange(counts_G.flatten().tolist())
        return np.sum(counts, axis=0).reshape(len(grid), -1)

    choice = mixture.choose(grid, histograms(grid, history_scores))
    if parts.text is not None:
        similarity = ranks.run_on_all(partial(TextSimilarity.of, dataset, parts.text))
        grid = mixture.text_grid(choice.mixture, parts.text)
        counts_G = histograms(grid, replace(history_scores, text=similarity))
        choice = mixture.choose_with_text(choice, grid, counts_G)
    if ranks.is_main:
        mixture.save(choice, run.path, mixture_origin(dataset, decoding, trained_through))
    return choice


def _check_not_pushed(run: Path) -> None:
    """Raises ValueError for a copy of a pushed run, which keeps no weights of a mixture."""
    if is_pushed(run):
        raise ValueError(
            f"{run}: no weights of hybrid were chosen before this run was pushed: choose them in "
            "the run itself and push it again, or give --decode exact"
        )


def _history_parts(
    dataset: Dataset,
    decoding: Decoding,
    trained_through: TrainedThrough,
    tune_graph: bool,
    text: str,
) -> Mixture:
    """The settings of graph, repeat model and text term, as a mixture without weights."""
    graph, repeat = decoding.mixture.graph, None
    if not decoding.exclude_history:
        repeat = fit_repeats(dataset.sequences, trained_through)
    if tune_graph:
        graph = tune_knn(
            dataset.sequences,
            # Beside a repeat model the graph has the new items alone.
            exclude_history=decoding.exclude_history or repeat is not None,
            trained_through=trained_through,
        ).settings
    term = None
    if text != NO_TEXT and dataset.descriptions is not None:
        term = tune_text(dataset, text)
    return Mixture(graph=graph, repeat=repeat, text=term)


def _same_on_all(ranks: Ranks, make: Callable[[], Mixture]) -> Mixture:
    """What rank 0 makes, on all ranks: floating point may differ between machines. Collective."""
    text = ranks.run_on_all(lambda: json.dumps(dataclasses.asdict(make())) if ranks.is_main else "")
    return section_from(Mixture, json.loads(ranks.broadcast_str(text)), None, "rank 0")


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
    texts = dataset.descriptions
    return {
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": decoding.exclude_history,
        **({} if texts is None else {mixture.TEXTS: texts.texts_hash}),
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
    return replace(decoding, mixture=mixed)


def chosen_mixture(
    run: LoadedRun, dataset: Dataset, exclude_history: bool, trained_through: TrainedThrough
) -> Mixture:
    """The mixture of the run's `hybrid.json`, for requests; that of a model with an item head has
    defaults. Raises ValueError as `mixed_decoding`, and where no weights were chosen."""
    decoding = Decoding(mode="hybrid", exclude_history=exclude_history)
    found = mixture.load(run.path, mixture_origin(dataset, decoding, trained_through))
    if found is None and not run.model.config.item_loss:
        _check_not_pushed(run.path)
        raise ValueError(
            f"{run.path}: no weights of hybrid were chosen yet: choose them by "
            f"genrec evaluate {run.path} --decode hybrid --split validation, or give --decode exact"
        )
    return found or Mixture()


def chosen_decoding(
    run: LoadedRun,
    dataset: Dataset,
    decoding: Decoding,
    trained_through: TrainedThrough,
    *,
    text: str = "words",
    ranks: Ranks | None = None,
    on_choice: Callable[[mixture.Choice], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Decoding:
    """The decoding with the mixture of the run's `hybrid.json`; where there is none, weights, graph
    settings and repeat model are chosen on validation first. Collective.

    Args:
        run, dataset, trained_through, text, ranks, on_batch: As of `tune_mixture`.
        decoding: What is changed.
        on_choice: Called on rank 0 with what was chosen.

    Raises:
        ValueError: As `mixed_decoding`, and where training saw the validation targets, so that
            nothing is left to choose by.
    """
    ranks = ranks or Ranks()
    # Only rank 0 looks, or a file that appears a moment later would part the ranks.
    exists = ranks.run_on_all(lambda: (run.path / mixture.FILE).is_file() if ranks.is_main else 0)
    if not ranks.exchange([int(exists)])[0][0]:
        if trained_through == "n-1":
            raise ValueError(
                f"{run.path}: trained through n-1, which leaves nothing to choose hybrid's weights "
                "by: give --graph-weight, as it was chosen for the run trained through n-2"
            )
        choice = tune_mixture(
            run,
            dataset,
            decoding=decoding,
            trained_through=trained_through,
            tune_graph=True,
            text=text,
            ranks=ranks,
            on_batch=on_batch,
        )
        if on_choice is not None and ranks.is_main:
            on_choice(choice)
        return replace(decoding, mixture=choice.mixture)
    return ranks.run_on_all(lambda: mixed_decoding(run, dataset, decoding, trained_through))
