"""Beam search without a trie, as the paper decodes: whatever token strings come out."""

# B users, K beams, L input tokens, D width, V vocabulary, T tokens generated, N list

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoding.beam_search import NEG_INF
from genrec_dist.decoding.decoder_state import Searchable, start_search


def generate_freely(
    model: Searchable,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    *,
    longest: int,
    beam: int,
    top: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best token strings of each user.

    Args:
        model, memory_BLD, mask_BL: As of `search_trie`.
        longest: Most tokens of a string before its `</s>`, which is in its score and not in its
            tokens.
        beam: Strings that are kept per user and step.
        top: Strings that are returned per user.

    Returns:
        (scores float32 [B, N] best first, tokens [B, N, T], how many of them count [B, N])
    """
    device, num_users, eos = memory_BLD.device, len(memory_BLD), model.config.eos_token_id
    state = start_search(model, memory_BLD, mask_BL)
    hidden_BKD = state.start(state.start_token)
    weight_VD = model.head_weight
    scores_BK = torch.zeros(num_users, 1, dtype=weight_VD.dtype, device=device)
    past_BKT = torch.zeros(num_users, 1, longest, dtype=torch.long, device=device)
    found_BN = scores_BK[:, :0]
    strings_BNT, lengths_BN = past_BKT[:, :0], past_BKT[:, :0, 0]
    for length in range(longest + 1):
        with torch.autocast(device.type, enabled=False):
            logits_BKV = hidden_BKD.to(weight_VD.dtype) @ weight_VD.T
            reached_BKV = logits_BKV.log_softmax(-1) + scores_BK[..., None]
        # Every end is a candidate for the list, whatever its rank, as in the trie's search.
        found_BX = torch.cat([found_BN, reached_BKV[..., eos]], 1)
        found_BX, places_BX = found_BX.sort(dim=1, descending=True, stable=True)
        found_BN, places_BN = found_BX[:, :top], places_BX[:, :top]
        strings_BNT = _take_rows(torch.cat([strings_BNT, past_BKT], 1), places_BN)
        lengths_BX = torch.cat([lengths_BN, torch.full_like(past_BKT[..., 0], length)], 1)
        lengths_BN = lengths_BX.gather(1, places_BN)
        if length == longest:
            break
        reached_BKV[..., eos] = NEG_INF
        kept = min(beam, reached_BKV.shape[-1])
        best_BKK, tokens_BKK = reached_BKV.topk(kept, -1)
        scores_BK, places_BK = best_BKK.flatten(1).topk(min(beam, best_BKK[0].numel()))
        parent_BK = places_BK // kept
        tokens_BK = tokens_BKK.flatten(1).gather(1, places_BK)
        if found_BN.shape[1] == top and bool((scores_BK[:, 0] <= found_BN[:, -1]).all()):
            break
        past_BKT = _take_rows(past_BKT, parent_BK)
        past_BKT[..., length] = tokens_BK
        state.reorder_beams(parent_BK)
        hidden_BKD = state.step(tokens_BK)
    return found_BN.float().cpu().numpy(), strings_BNT.cpu().numpy(), lengths_BN.cpu().numpy()


def _take_rows(strings_BXT: Tensor, places_BN: Tensor) -> Tensor:
    return strings_BXT.gather(1, places_BN[..., None].expand(-1, -1, strings_BXT.shape[-1]))
