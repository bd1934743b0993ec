"""Validation during training: ranks of targets and the loss of histories."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from genrec_shards.sequences import SplitView

from genrec_dist.data.collate import target_batch
from genrec_dist.data.encoder_input import encode_histories, ragged
from genrec_dist.data.layout import Layout
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.watch import VALIDATED, VALIDATING
from genrec_dist.evaluation.metrics import (
    TOP,
    metrics_from_histogram,
    rank_histogram,
    target_ranks,
)
from genrec_dist.inference.rank_users import Decoding, cut_batches, rank_batch
from genrec_dist.model.causal.kinds import AnyModel, loss_of_targets
from genrec_dist.model.causal.prompted import PromptedModel

PROMPTS_AT_ONCE = 32
"""Users whose prompts go through the layers together where nothing else bounds their number."""


LOSS_USERS = 1000
"""Of whose targets the loss is taken: it is then steady enough for a curve."""


def validation_scores(
    model: AnyModel,
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> tuple[float, dict[str, float]]:
    """The loss of the first users' targets by a model, and the metrics of all users' lists by a
    searcher of it. Collective; the other arguments are those of `target_histogram`."""
    loss = history_loss(
        model, layout, view, user_rows_U[:LOSS_USERS], ranks, on_progress=on_progress
    )
    counts = target_histogram(searcher, layout, view, user_rows_U, decoding, ranks, on_progress)
    return loss, metrics_from_histogram(counts)


def target_histogram(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> np.ndarray:
    """int64 [21], as `rank_histogram`, of these users' targets; the ranks share the batches, and no
    list travels. Collective. `on_progress` is told what this rank does, at each batch."""
    batches = cut_batches((view.ends - view.starts)[user_rows_U], decoding.batch_size)

    def count_ranks() -> np.ndarray:
        counts = np.zeros(TOP + 1, np.int64)
        for places_B in batches[ranks.rank :: ranks.size]:
            on_progress(VALIDATING)
            rows_B = user_rows_U[places_B]
            lists = rank_batch(searcher, layout, view, rows_B, decoding)
            counts += rank_histogram(target_ranks(lists.items, view.targets[rows_B]))
        on_progress(VALIDATED)
        return counts

    counts = ranks.exchange(ranks.run_on_all(count_ranks).tolist())
    total: np.ndarray = np.sum(counts, axis=0)
    assert total.sum() == len(user_rows_U)
    return total


@torch.inference_mode()
def history_loss(
    model: AnyModel,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    ranks: Ranks,
    batch_size: int | None = None,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> float:
    """Cross-entropy per target token of these users' targets, the model as it is. Collective.

    The ranks share the batches, and the sum of their sums is exact before it is rounded: the same
    for any number of ranks.
    """
    if batch_size is None:
        batch_size = PROMPTS_AT_ONCE if isinstance(model, PromptedModel) else 250
    starts = range(0, len(user_rows_U), batch_size)

    def sum_losses() -> list[tuple[float, int]]:
        """(sum of the cross-entropies, target tokens) of each batch of this rank."""
        sums = []
        for start in starts[ranks.rank :: ranks.size]:
            on_progress(VALIDATING)
            rows_B = user_rows_U[start : start + batch_size]
            flat, offsets = ragged(view.starts[rows_B], (view.ends - view.starts)[rows_B])
            encoder = encode_histories(view.items[flat], offsets, rows_B, layout)
            batch = target_batch(encoder, view.targets[rows_B], layout).to(model.device)
            sums.append((float(loss_of_targets(model, batch)), batch.num_target_tokens))
        on_progress(VALIDATED)
        return sums

    sums = ranks.run_on_all(sum_losses)
    sums += [(0.0, 0)] * (-(-len(starts) // ranks.size) - len(sums))
    losses, tokens = zip(*sums, strict=True)
    bits = np.array(losses, np.float64).view(np.int64)  # integers travel exactly
    shared = np.array(ranks.exchange([*bits.tolist(), *tokens]), np.int64)
    shared = shared.reshape(ranks.size, 2, -1)
    total = math.fsum(np.ascontiguousarray(shared[:, 0]).view(np.float64).flatten())
    return total / int(shared[:, 1].sum())
