"""Ranking by the item head, and by the decoder together with the item head and the transition
graph."""

# B users, C candidates, N items, L input tokens, D width, V tokens of a level

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genrec_dist.data.item_graph import log_near
from genrec_dist.decoding.beam_search import NEG_INF, Levels, step_log_probabilities
from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.decoding.output_head import Heads
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.model.genrec import GenRecForConditionalGeneration


@dataclass(frozen=True)
class Candidates:
    """The items of some users that hybrid ranks, and what its parts say of them."""

    items_BC: Tensor
    """int64 item rows, each once; -1 where there is none."""
    decoder_logp_BC: Tensor
    """log p of the decoder, -inf where there is none."""
    item_logp_BC: Tensor | None
    """log p of the item head, where the model has one."""
    graph_prob_BC: Tensor | None
    """The graph's, where there was one."""
    num_items: int

    def mixed(self, mixture: Mixture) -> Tensor:
        """The scores [B, C] by which they are ranked, as `Mixture` says; -inf where there is no
        item."""
        mixed_BC = self.decoder_logp_BC.clone()
        if self.item_logp_BC is not None and mixture.item_weight:
            mixed_BC.add_(self.item_logp_BC, alpha=mixture.item_weight)
        if self.graph_prob_BC is not None and mixture.graph_weight:
            mixed_BC.add_(
                log_near(self.graph_prob_BC, mixture.epsilon, self.num_items),
                alpha=mixture.graph_weight,
            )
        return mixed_BC


def item_log_probabilities(
    model: GenRecForConditionalGeneration, memory_BLD: Tensor, mask_BL: Tensor
) -> Tensor:
    """log p of every item under the item head, float [B, N], from the encoder's state at [MASK],
    the last but </s>; of a causal encoder from the last one.

    Raises ValueError for a model without an item head.
    """
    if not model.config.item_loss:
        raise ValueError(
            "this model has no item head: train with model.item_loss above 0, or decode in another mode"
        )
    masked_BD = model.masked_states(memory_BLD, mask_BL)
    # As the decoder's head: rounded logits would tie.
    with torch.autocast(memory_BLD.device.type, enabled=False):
        return model.item_logits(masked_BD.to(model.head_weight.dtype)).log_softmax(-1)


def with_best(items_BC: Tensor, scores_BN: Tensor, count: int) -> Tensor:
    """Candidates int64 [B, C] with the best `count` items by other scores behind them, each once;
    -1 elsewhere, and where these are -inf."""
    best = scores_BN.topk(min(count, scores_BN.shape[1]))
    known_BK = (best.indices[:, :, None] == items_BC[:, None]).any(2) | (best.values == NEG_INF)
    return torch.cat([items_BC, best.indices.masked_fill(known_BK, -1)], 1)


def score_candidates(
    model: GenRecForConditionalGeneration,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    paths_BCT: Tensor,
) -> Tensor:
    """log p [B, C] of the decoder speaking each candidate and then </s>, as the beam and
    `score_all` score them.

    `paths_BCT`: int64, a candidate's nodes from below the root on, `levels.sentinel` behind its
    last."""
    state = DecoderState(model, memory_BLD, mask_BL)
    hidden_BKD = state.start(
        memory_BLD.new_full((1,), model.config.decoder_start_token_id, dtype=torch.long)
    )
    total_BC = torch.zeros_like(paths_BCT[..., 0], dtype=memory_BLD.dtype)
    before_BC = torch.zeros_like(paths_BCT[..., 0])
    for level in range(levels.depth + 1):
        nodes_BK = before_BC[:, :1] if level == 0 else before_BC
        logprob_BKV = step_log_probabilities(levels, heads, level, hidden_BKD, nodes_BK)
        if level == 0:
            logprob_BKV = logprob_BKV.expand(-1, paths_BCT.shape[1], -1)
        ended_BC = torch.full_like(before_BC, levels.sentinel)
        here_BC = paths_BCT[..., level] if level < levels.depth else ended_BC
        # Column 0 is </s>'s: where the item has ended it is added once.
        gained_BC = logprob_BKV.gather(2, levels.column[here_BC][..., None])[..., 0]
        total_BC = total_BC + gained_BC.masked_fill(before_BC == levels.sentinel, 0.0)
        if level < levels.depth:
            if level + 1 < levels.num_asked:
                hidden_BKD = state.step(levels.token[here_BC])
            before_BC = here_BC
    return total_BC.masked_fill(paths_BCT[..., 0] == levels.sentinel, NEG_INF)
