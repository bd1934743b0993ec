"""The oracle of the trie search: every item of the catalogue scored for every user."""

# B users, M nodes of a slice, L input tokens, D width, N items

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoding.beam_search import NEG_INF, Levels, step_log_probabilities
from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.decoding.output_head import Heads
from genrec_dist.decoding.trie import Trie
from genrec_dist.model.genrec import GenRecForConditionalGeneration

ROWS_AT_ONCE = 8192
"""Decoder rows of one step: users times nodes."""
NODES_AT_ONCE = 2048


def score_all(
    model: GenRecForConditionalGeneration,
    trie: Trie,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
) -> Tensor:
    """Log-probabilities [B, N] of all items, -inf for those that are not in the trie; each user
    walks the whole trie once."""
    shape = (len(memory_BLD), len(trie.item_node))
    scores_BN = torch.full(shape, NEG_INF, dtype=heads.levels[0].dtype, device=memory_BLD.device)
    start = torch.full(
        (1,), model.config.decoder_start_token_id, dtype=torch.long, device=memory_BLD.device
    )
    users_at_once = max(1, ROWS_AT_ONCE // min(NODES_AT_ONCE, trie.num_nodes))
    for first in range(0, len(memory_BLD), users_at_once):
        part = slice(first, first + users_at_once)
        state = DecoderState(model, memory_BLD[part], mask_BL[part])
        hidden_B1D = state.start(start)
        _Descent(trie, levels, heads, scores_BN[part]).below(
            state, hidden_B1D, scores_BM=torch.zeros_like(scores_BN[part, :1]), level=0, first=0
        )
    return scores_BN


@dataclass(frozen=True)
class _Descent:
    """A walk of some users down the whole trie."""

    trie: Trie
    levels: Levels
    heads: Heads
    found_BN: Tensor
    """Where the scores go."""

    def below(
        self, state: DecoderState, hidden_BMD: Tensor, scores_BM: Tensor, level: int, first: int
    ) -> None:
        """Score what ends at the nodes first .. first + M - 1 of a level, then slice by slice what
        lies below them.

        Siblings stand side by side, so the children of a slice of nodes are a slice again. Slices
        go down one after another: memory holds one slice a level."""
        trie = self.trie
        nodes = slice(first, first + scores_BM.shape[1])
        nodes_M = torch.arange(first, first + scores_BM.shape[1], device=hidden_BMD.device)
        nodes_BM = nodes_M.expand(len(hidden_BMD), -1)
        reached_BMV = step_log_probabilities(self.levels, self.heads, level, hidden_BMD, nodes_BM)
        reached_BMV = reached_BMV.add_(scores_BM[..., None])
        ending = np.flatnonzero(trie.end_item[nodes] >= 0)
        self.found_BN[:, trie.end_item[nodes][ending]] = reached_BMV[:, ending, 0]
        num_children_M = trie.num_children[nodes]
        parents = np.repeat(np.arange(len(num_children_M)), num_children_M)
        for start in range(0, len(parents), NODES_AT_ONCE):
            parent_M = torch.from_numpy(parents[start : start + NODES_AT_ONCE]).to(
                hidden_BMD.device
            )
            child = int(trie.first_child[first]) + start
            children = slice(child, child + len(parent_M))
            further, states_BMD = state, hidden_BMD
            if level + 1 < self.levels.num_asked:
                further = state.fork(parent_M.expand(len(hidden_BMD), -1))
                states_BMD = further.step(self.levels.token[children].expand(len(hidden_BMD), -1))
            gained_BM = reached_BMV[:, parent_M, self.levels.column[children]]
            self.below(further, states_BMD, gained_BM, level + 1, child)
