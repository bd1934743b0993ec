"""Ranking by the item head, and by the decoder together with the item head and the transition
graph."""

# B users, C candidates, N items, L input tokens, D width, T tokens, V tokens of a level

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genrec_dist.data.item_graph import log_near
from genrec_dist.decoding.beam_search import NEG_INF, step_log_probabilities
from genrec_dist.decoding.decoder_state import Searchable, start_search
from genrec_dist.decoding.levels import Levels
from genrec_dist.decoding.output_head import Heads
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.model.network import Network


@dataclass(frozen=True)
class HistoryProbabilities:
    """What a mixture knows of the next item from the history alone, float [B, N] of all items, rows
    that sum to one, or [B, C] of candidates; None where a part has no weight."""

    graph: Tensor | None = None
    """Under the transition graph."""
    repeat: Tensor | None = None
    """Under the repeat model."""
    text: Tensor | None = None
    """Share of nearness by text."""

    def map(self, change: Callable[[Tensor], Tensor]) -> HistoryProbabilities:
        """With `change` of each part that is there."""
        parts = (self.graph, self.repeat, self.text)
        return HistoryProbabilities(*(None if one is None else change(one) for one in parts))


@dataclass(frozen=True)
class Candidates:
    """The items of some users that hybrid ranks, and their scores by each of its parts."""

    items_BC: Tensor
    """int64 item rows, each once; -1 where there is none."""
    decoder_logp_BC: Tensor
    """log p of the decoder, -inf where there is no item."""
    item_logp_BC: Tensor | None
    """log p of the item head, where the model has one."""
    known: HistoryProbabilities
    num_items: int

    def mix_scores(self, mixture: Mixture) -> Tensor:
        """The scores [B, C] by which they are ranked, as `Mixture` says; -inf where there is no
        item."""
        mixed_BC, known = self.decoder_logp_BC.clone(), self.known
        if self.item_logp_BC is not None and mixture.item_weight:
            mixed_BC.add_(self.item_logp_BC, alpha=mixture.item_weight)
        if known.graph is not None and mixture.graph_weight:
            graph_logp_BC = log_near(known.graph, mixture.epsilon, self.num_items)
            mixed_BC.add_(graph_logp_BC, alpha=mixture.graph_weight)
        if known.repeat is not None and mixture.repeat_weight:
            mixed_BC.add_(known.repeat.log(), alpha=mixture.repeat_weight)
        if known.text is not None and mixture.text is not None:
            text_logp_BC = log_near(known.text, mixture.text.epsilon, self.num_items)
            mixed_BC.add_(text_logp_BC, alpha=mixture.text.weight)
        return mixed_BC


def item_log_probabilities(model: Searchable, memory_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """log p of every item under the item head, float [B, N], from the encoder's state at [MASK],
    the last but </s>; of a causal encoder from the last one. Raises ValueError where the model has
    no item head."""
    if not model.config.item_loss:
        raise ValueError(
            "this model has no item head: train with model.item_loss above 0, "
            "or decode in another mode"
        )
    assert isinstance(model, Network)
    masked_BD = model.masked_states(memory_BLD, mask_BL)
    # As the decoder's head: rounded logits would tie.
    with torch.autocast(memory_BLD.device.type, enabled=False):
        return model.item_logits(masked_BD.to(model.head_weight.dtype)).log_softmax(-1)


def add_best(items_BC: Tensor, scores_BN: Tensor, count: int) -> Tensor:
    """Candidates int64 [B, C] and after them the best `count` items by other scores, each once; -1
    for those that are there already, and where scores are -inf."""
    best = scores_BN.topk(min(count, scores_BN.shape[1]))
    known_BK = (best.indices[:, :, None] == items_BC[:, None]).any(2) | (best.values == NEG_INF)
    return torch.cat([items_BC, best.indices.masked_fill(known_BK, -1)], 1)


def score_candidates(
    model: Searchable,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    paths_BCT: Tensor,
) -> Tensor:
    """log p [B, C] of the decoder for each candidate's tokens and then </s>, the same as the beam
    and `score_all` give.

    Args:
        model, levels, heads, memory_BLD, mask_BL: As of `search_trie`.
        paths_BCT: int64, a candidate's nodes from below the root on, `levels.sentinel` after its
            last one.
    """
    state = start_search(model, memory_BLD, mask_BL)
    hidden_BKD = state.start(state.start_token)
    total_BC = torch.zeros_like(paths_BCT[..., 0], dtype=memory_BLD.dtype)
    before_BC = torch.zeros_like(paths_BCT[..., 0])
    for level in range(levels.depth + 1):
        nodes_BK = before_BC[:, :1] if level == 0 else before_BC
        logprob_BKV = step_log_probabilities(levels, heads, level, hidden_BKD, nodes_BK)
        logprob_BCV = logprob_BKV.expand(-1, paths_BCT.shape[1], -1)
        ended = level == levels.depth
        next_BC = torch.full_like(before_BC, levels.sentinel) if ended else paths_BCT[..., level]
        # The sentinel's column 0 is that of </s>: where the item has ended it is added once.
        gained_BC = logprob_BCV.gather(2, levels.column[next_BC][..., None])[..., 0]
        total_BC = total_BC + gained_BC.masked_fill(before_BC == levels.sentinel, 0.0)
        if level + 1 < levels.num_decoded and not ended:
            hidden_BKD = state.step(levels.token[next_BC])
        before_BC = next_BC
    return total_BC.masked_fill(paths_BCT[..., 0] == levels.sentinel, NEG_INF)
