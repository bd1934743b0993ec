"""The oracle of the trie search: every item of the catalogue scored for every user."""

# B users, M nodes of a slice, N items

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoder import DecoderState

if TYPE_CHECKING:
    from genrec_dist.batch import EncoderInput
    from genrec_dist.beam import TopItems, TrieSearcher

NOTHING = float("-inf")
ROWS_AT_ONCE = 8192
"""Decoder rows of one step: users times nodes."""
NODES_AT_ONCE = 2048


def search_all(
    searcher: TrieSearcher, encoder: EncoderInput, *, top: int, excluded: tuple[np.ndarray, np.ndarray] | None
) -> TopItems:
    """The best `top` of all items a user, equal scores by smaller node, as the beam lists them."""
    from genrec_dist.beam import as_lists, best_of

    scores_BN = score_all(searcher, encoder)
    if excluded is not None:
        users, items = (torch.from_numpy(np.asarray(column, np.int64)).to(searcher.device) for column in excluded)
        scores_BN[users, items] = NOTHING
    # Where every item ends differs from its row; the tie rule goes by the node.
    item_node = torch.from_numpy(searcher.trie.item_node).to(searcher.device)
    scores_BN[:, item_node < 0] = NOTHING
    best_BN, _, rows_BN = best_of(scores_BN, item_node.expand_as(scores_BN), top)
    return as_lists(best_BN, rows_BN, top)


@torch.inference_mode()
def score_all(searcher: TrieSearcher, encoder: EncoderInput) -> Tensor:
    """Log-probabilities [B, N] of all items under the whole softmax, each user's catalogue walked once through the trie."""
    memory_BLD = searcher.model.encode(encoder)
    num_users, num_items = len(memory_BLD), len(searcher.trie.item_node)
    scores_BN = torch.full((num_users, num_items), NOTHING, dtype=searcher.heads[0].dtype, device=searcher.device)
    users_at_once = max(1, ROWS_AT_ONCE // min(NODES_AT_ONCE, searcher.trie.num_nodes))
    for first in range(0, num_users, users_at_once):
        part = slice(first, first + users_at_once)
        state = DecoderState(searcher.model, memory_BLD[part], encoder.attention_mask[part])
        start = torch.full((1,), searcher.model.config.decoder_start_token_id, dtype=torch.long, device=searcher.device)
        hidden_B1D = state.start(start)
        _descend(searcher, state, hidden_B1D, torch.zeros_like(scores_BN[part, :1]), 0, 0, scores_BN[part])
    return scores_BN


def _descend(
    searcher: TrieSearcher,
    state: DecoderState,
    hidden_BMD: Tensor,
    scores_BM: Tensor,
    level: int,
    first: int,
    out_BN: Tensor,
) -> None:
    """Score what ends at the nodes first .. first + M - 1 of a level, then slice by slice what lies below them.

    Siblings stand side by side, so the children of a slice of nodes are a slice again; slices go down one after another,
    and memory holds one slice a level.
    """
    from genrec_dist.beam import log_probabilities

    trie = searcher.trie
    nodes = slice(first, first + hidden_BMD.shape[1])
    reached_BMV = log_probabilities(hidden_BMD, searcher.heads[level], searcher.softmaxes["exact"])
    reached_BMV += scores_BM[..., None]
    items_M = trie.end_item[nodes]
    ending = np.flatnonzero(items_M >= 0)
    out_BN[:, items_M[ending]] = reached_BMV[..., 0][:, ending]
    children = trie.num_children[nodes]
    if not children.any():
        return
    parent = np.repeat(np.arange(len(children)), children)
    first_child = int(trie.first_child[first])
    columns = searcher.levels.column[first_child : first_child + len(parent)]
    for start in range(0, len(parent), NODES_AT_ONCE):
        part = slice(start, min(start + NODES_AT_ONCE, len(parent)))
        parent_M = torch.from_numpy(parent[part]).to(searcher.device)
        reached_BM = reached_BMV[:, parent_M, columns[part]]
        below = state.fork(parent_M.expand(len(hidden_BMD), -1))
        tokens_BM = searcher.levels.token[first_child + start : first_child + part.stop].expand(len(hidden_BMD), -1)
        _descend(searcher, below, below.step(tokens_BM), reached_BM, level + 1, first_child + start, out_BN)
