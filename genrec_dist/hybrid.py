"""Ranking by the item head, and by both heads together."""

# B users, C candidates, N items, L input tokens, D width, V tokens of a level

from __future__ import annotations

import torch
from torch import Tensor

from genrec_dist.decoder import DecoderState
from genrec_dist.head import Heads, log_probabilities
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.trie_walk import NOTHING, Levels


def item_log_probabilities(model: GenRecForConditionalGeneration, memory_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """log p of every item under the item head, float [B, N], from the encoder's state at [MASK], the last but </s>; of a causal
    encoder from the last one.

    Raises ValueError for a model without an item head.
    """
    if not model.config.item_loss:
        raise ValueError("this model has no item head: train with model.item_loss above 0, or decode in another mode")
    masked_BD = model.masked_states(memory_BLD, mask_BL)
    # As the decoder's head: rounded logits would tie.
    with torch.autocast(memory_BLD.device.type, enabled=False):
        return model.item_logits(masked_BD.to(model.head_weight.dtype)).log_softmax(-1)


def both(item_scores_BN: Tensor, beam_items_BK: Tensor, count: int) -> Tensor:
    """Candidates int64 [B, C]: a beam's items and the item head's best `count`, each once; -1 elsewhere."""
    best_BK = item_scores_BN.topk(min(count, item_scores_BN.shape[1])).indices
    known_BK = (best_BK[:, :, None] == beam_items_BK[:, None]).any(2)
    return torch.cat([beam_items_BK, best_BK.masked_fill(known_BK, -1)], 1)


def score_candidates(
    model: GenRecForConditionalGeneration,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    paths_BCT: Tensor,
) -> Tensor:
    """log p [B, C] of the decoder speaking each candidate and then </s>, as the beam and `score_all` score them.

    `paths_BCT`: int64, a candidate's nodes from below the root on, `levels.nowhere` behind its last.
    """
    state = DecoderState(model, memory_BLD, mask_BL)
    hidden_BKD = state.start(memory_BLD.new_full((1,), model.config.decoder_start_token_id, dtype=torch.long))
    total_BC = torch.zeros_like(paths_BCT[..., 0], dtype=memory_BLD.dtype)
    before_BC = torch.zeros_like(paths_BCT[..., 0])
    for level in range(levels.depth + 1):
        logprob_BKV = log_probabilities(heads, level, hidden_BKD)
        if level == 0:
            logprob_BKV = logprob_BKV.expand(-1, paths_BCT.shape[1], -1)
        ended_BC = torch.full_like(before_BC, levels.nowhere)
        here_BC = paths_BCT[..., level] if level < levels.depth else ended_BC
        # Column 0 is </s>'s: where the item has ended it is added once.
        gained_BC = logprob_BKV.gather(2, levels.column[here_BC][..., None])[..., 0]
        total_BC = total_BC + gained_BC.masked_fill(before_BC == levels.nowhere, 0.0)
        if level < levels.depth:
            hidden_BKD = state.step(levels.token[here_BC])
            before_BC = here_BC
    return total_BC.masked_fill(paths_BCT[..., 0] == levels.nowhere, NOTHING)
