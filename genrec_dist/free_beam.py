"""Beam search without a trie, as the paper decodes: whatever text comes out, read by the numbering."""

# B users, K beams, V vocabulary, T tokens generated, N list

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoder import DecoderState
from genrec_dist.metrics import EMPTY, INVALID

if TYPE_CHECKING:
    from genrec_dist.batch import EncoderInput
    from genrec_dist.beam import TopItems, TrieSearcher

NOTHING = float("-inf")


def search_freely(
    searcher: TrieSearcher,
    encoder: EncoderInput,
    *,
    beam: int,
    top: int,
    excluded: tuple[np.ndarray, np.ndarray] | None,
) -> TopItems:
    """The best `top` token strings a user, each ended by `</s>`, and what they say.

    A string that is no item's word keeps its place as -2, an item that two strings spell stands twice: the rates of both
    are what this mode is asked for. Excluded items are struck out, and the list becomes shorter. Strings longer than the
    longest item have no `</s>` in time and are not listed. Raises ValueError for a searcher that cannot read texts.
    """
    from genrec_dist.beam import TopItems, encode_by_length

    if searcher.texts is None:
        raise ValueError("decode mode free needs the run's tokenizer: load the run with load_run")
    memory_BLD = encode_by_length(searcher.model, encoder)
    scores_BN, tokens_BNT, lengths_BN = _generate(searcher, memory_BLD, encoder.attention_mask, beam, top)
    items = np.full(scores_BN.shape, EMPTY, np.int32)
    listed = scores_BN > NOTHING
    strings = [tokens[:length] for tokens, length in zip(tokens_BNT[listed], lengths_BN[listed], strict=True)]
    items[listed] = searcher.texts.rows(strings)
    assert INVALID == -2
    return _without_excluded(TopItems(items, scores_BN), excluded)


def _generate(
    searcher: TrieSearcher, memory_BLD: Tensor, mask_BL: Tensor, beam: int, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores float32 [B, N], tokens [B, N, T], their numbers [B, N]), best first."""
    model, device = searcher.model, searcher.device
    eos, num_users = model.config.eos_token_id, len(memory_BLD)
    longest = searcher.levels.depth
    state = DecoderState(model, memory_BLD, mask_BL)
    start = torch.full((1,), model.config.decoder_start_token_id, dtype=torch.long, device=device)
    hidden_BKD = state.start(start)
    weight_VD = model.lm_head.weight
    scores_BK = torch.zeros(num_users, 1, dtype=weight_VD.dtype, device=device)
    past_BKT = torch.zeros(num_users, 1, longest, dtype=torch.long, device=device)
    found_BN = scores_BK[:, :0]
    strings_BNT, lengths_BN = past_BKT[:, :0], past_BKT[:, :0, 0]
    for length in range(longest + 1):
        with torch.autocast(device.type, enabled=False):
            logits_BKV = hidden_BKD.to(weight_VD.dtype) @ weight_VD.T
            reached_BKV = logits_BKV.log_softmax(-1) + scores_BK[..., None]
        # An end is a candidate for the list wherever it stands, as in the trie's search.
        found_BN, places_BN = torch.cat([found_BN, reached_BKV[..., eos]], 1).sort(dim=1, descending=True, stable=True)
        found_BN, places_BN = found_BN[:, :top], places_BN[:, :top]
        strings_BNT = _rows(torch.cat([strings_BNT, past_BKT], 1), places_BN)
        lengths_BN = torch.cat([lengths_BN, torch.full_like(past_BKT[..., 0], length)], 1).gather(1, places_BN)
        if length == longest:
            break
        reached_BKV[..., eos] = NOTHING
        kept = min(beam, reached_BKV.shape[-1])
        best_BKK, tokens_BKK = reached_BKV.topk(kept, -1)
        scores_BK, places_BK = best_BKK.flatten(1).topk(min(beam, best_BKK[0].numel()))
        parent_BK = places_BK // kept
        tokens_BK = tokens_BKK.flatten(1).gather(1, places_BK)
        if found_BN.shape[1] == top and bool((scores_BK[:, 0] <= found_BN[:, -1]).all()):
            break
        past_BKT = _rows(past_BKT, parent_BK)
        past_BKT[..., length] = tokens_BK
        state.follow(parent_BK)
        hidden_BKD = state.step(tokens_BK)
    return found_BN.float().cpu().numpy(), strings_BNT.cpu().numpy(), lengths_BN.cpu().numpy()


def _rows(strings_BXT: Tensor, places_BN: Tensor) -> Tensor:
    return strings_BXT.gather(1, places_BN[..., None].expand(-1, -1, strings_BXT.shape[-1]))


def _without_excluded(lists: TopItems, excluded: tuple[np.ndarray, np.ndarray] | None) -> TopItems:
    """Lists closed up where an excluded item stood."""
    if excluded is None:
        return lists
    users, items = (np.asarray(column, np.int64) for column in excluded)
    span = max(int(items.max(initial=0)), int(lists.items.max(initial=0))) + 1
    keys = np.arange(len(lists.items))[:, None] * span + lists.items
    struck = np.isin(keys, users * span + items) & (lists.items >= 0)
    order = np.argsort(struck, axis=1, kind="stable")
    closed = np.take_along_axis(np.where(struck, EMPTY, lists.items), order, 1)
    scores = np.take_along_axis(np.where(struck, np.float32(NOTHING), lists.scores), order, 1)
    return type(lists)(closed, scores)
