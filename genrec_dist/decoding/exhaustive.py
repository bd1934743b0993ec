"""The oracle of the trie search: every item of the catalogue scored for every user."""

# B users, M nodes of a slice, L input tokens, D width, N items

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoding.beam_search import NEG_INF, step_log_probabilities
from genrec_dist.decoding.decoder_state import Searchable, SearchState, start_search
from genrec_dist.decoding.levels import Levels
from genrec_dist.decoding.output_head import Heads
from genrec_dist.decoding.trie import Trie

ROWS_AT_ONCE = 8192
"""Decoder rows of one step: users times nodes."""
NODES_AT_ONCE = 2048


def score_all(
    model: Searchable,
    trie: Trie,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
) -> Tensor:
    """Log-probabilities [B, N] of all items; -inf for those that are not in the trie.

    Siblings have consecutive numbers, so the children of a slice of nodes are a slice again. Each
    slice goes down to the leaves before the next one starts: memory holds one slice per level.

    Arguments are those of `search_trie`; `levels` is `trie` on the device.
    """
    dtype, device = heads.levels[0].dtype, memory_BLD.device
    shape = (len(memory_BLD), len(trie.item_node))
    found_BN = torch.full(shape, NEG_INF, dtype=dtype, device=device)

    def score_below(
        users: slice,
        state: SearchState,
        hidden_BMD: Tensor,
        scores_BM: Tensor,
        level: int,
        first: int,
    ) -> None:
        """Score the items at the nodes first .. first + M - 1 of a level and below them."""
        num_users, num_nodes = scores_BM.shape
        nodes = slice(first, first + num_nodes)
        nodes_BM = torch.arange(first, first + num_nodes, device=device).expand(num_users, -1)
        reached_BMV = step_log_probabilities(levels, heads, level, hidden_BMD, nodes_BM)
        reached_BMV = reached_BMV.add_(scores_BM[..., None])
        ending = np.flatnonzero(trie.end_item[nodes] >= 0)
        found_BN[users, trie.end_item[nodes][ending]] = reached_BMV[:, ending, 0]
        parents = np.repeat(np.arange(num_nodes), trie.num_children[nodes])
        for start in range(0, len(parents), NODES_AT_ONCE):
            parent_M = torch.from_numpy(parents[start : start + NODES_AT_ONCE]).to(device)
            child = int(trie.first_child[first]) + start
            children = slice(child, child + len(parent_M))
            further, states_BMD = state, hidden_BMD
            if level + 1 < levels.num_decoded:
                further = state.fork(parent_M.expand(num_users, -1))
                states_BMD = further.step(levels.token[children].expand(num_users, -1))
            gained_BM = reached_BMV[:, parent_M, levels.column[children]]
            score_below(users, further, states_BMD, gained_BM, level + 1, child)

    users_at_once = max(1, ROWS_AT_ONCE // min(NODES_AT_ONCE, trie.num_nodes))
    for first_user in range(0, len(memory_BLD), users_at_once):
        users = slice(first_user, first_user + users_at_once)
        state = start_search(model, memory_BLD[users], mask_BL[users])
        hidden_B1D = state.start(state.start_token)
        score_below(users, state, hidden_B1D, torch.zeros_like(found_BN[users, :1]), 0, 0)
    return found_BN
