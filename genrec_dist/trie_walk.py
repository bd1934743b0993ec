"""The walk of a beam down the item trie, in tensors."""

# B users, K beams, C children, X candidates or pairs, P prefix tokens, L input tokens, D width, V tokens of a level, N list

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.decoder import DecoderState
from genrec_dist.head import Heads, log_probabilities
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.trie import Pruned, Trie

Ends = Literal["kept", "ranked"]
"""What becomes of an item that ends at a beam. kept: it is a candidate for the list. ranked: only if it stands among the
`beam` best candidates of its step, continuations included, as Hugging Face's `generate` has it."""

NOTHING = float("-inf")
FEWEST_PAIRS = 256
"""What a static search pads the exclusions of a level to at least."""


class Levels:
    """The trie as a search reads it, level by level, on its device."""

    def __init__(self, trie: Trie, device: torch.device):
        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.depth = trie.depth
        self.nowhere = trie.num_nodes
        """A node that is none: where a beam stands that has no child to go to. Nothing ends or continues there."""
        self.token = move(np.append(trie.token.astype(np.int64).clip(min=0), 0))
        self.first_child = move(np.append(trie.first_child, 0))
        self.num_children = move(np.append(trie.num_children, 0))
        self.end_item = move(np.append(trie.end_item.astype(np.int64), -1))
        self.fans = [trie.widest_fan(level) for level in range(trie.depth + 1)]
        self.num_nodes = np.diff(trie.level_offsets).tolist()
        self.first_nodes = trie.level_offsets[:-1].tolist()
        self.tokens: list[Tensor] = []
        """int64 [V_l], distinct tokens below the nodes of each level, ascending."""
        column = np.zeros(trie.num_nodes + 1, np.int64)
        for first, last in [*pairwise(trie.level_offsets[1:]), (trie.num_nodes, trie.num_nodes)]:
            tokens, columns = np.unique(trie.token[first:last], return_inverse=True)
            self.tokens.append(move(tokens.astype(np.int64)))
            column[first:last] = columns + 1
        self.column = move(column)
        """int64 [M], where a node's token stands in the logits of the level above, behind `</s>` at 0."""
        self.num_forced = _num_forced(trie)
        self.prefix = self.token[1 : self.num_forced + 1]
        """int64, the tokens that all items begin with."""


def _num_forced(trie: Trie) -> int:
    """Levels from the root on at whose one node no item ends and one token follows."""
    forced = 0
    while forced < trie.depth and trie.num_children[forced] == 1 and trie.end_item[forced] < 0:
        forced += 1
    return forced


@dataclass(frozen=True)
class Lost:
    """What exclusion takes, by level, on the searcher's device."""

    ends: list[tuple[Tensor, Tensor]]
    """(users, nodes) int64 [X] where the item of a node with children is excluded."""
    dead: list[tuple[Tensor, Tensor, Tensor]]
    """(users, parents, places among the parent's children) int64 [X] of the nodes below which nothing is left."""


def lost_on(trie: Trie, pairs: Pruned, device: torch.device, padded: bool) -> Lost:
    def at_level(users: np.ndarray, nodes: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        here = (nodes >= first) & (nodes < last)
        return users[here], nodes[here]

    def move(*columns: np.ndarray) -> tuple[Tensor, ...]:
        # Padded to few sizes; a pair of padding names a node that no beam stands at.
        size = max(FEWEST_PAIRS, 1 << (len(columns[0]) - 1).bit_length()) if padded else len(columns[0])
        filled = [np.full(size, fill, np.int64) for fill in (0, -1, 0)[: len(columns)]]
        for whole, column in zip(filled, columns, strict=True):
            whole[: len(column)] = column
        return tuple(torch.from_numpy(column).to(device, non_blocking=True) for column in filled)

    inner = trie.num_children[pairs.end_nodes] > 0
    end_users, end_nodes = pairs.end_users[inner], pairs.end_nodes[inner]
    ends, dead = [], []
    for first, last in pairwise(trie.level_offsets):
        ends.append(move(*at_level(end_users, end_nodes, first, last)))
        users, nodes = at_level(pairs.dead_users, pairs.dead_nodes, first, last)
        parents = trie.parent[nodes]
        dead.append(move(users, parents, nodes - trie.first_child[parents]))
    return Lost(ends, dead)  # type: ignore[arg-type]


def walk(
    model: GenRecForConditionalGeneration,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    lost: Lost | None,
    *,
    beam: int,
    top: int,
    ends: Ends,
    static: bool,
) -> tuple[Tensor, Tensor]:
    """(scores, nodes) of the best `top` items a user, [B, N]. With `static` the same operators in the same shapes for all users."""
    best = best_static if static else best_of
    num_users, device = len(memory_BLD), memory_BLD.device
    state = DecoderState(model, memory_BLD, mask_BL)
    mask_token = torch.full((1,), model.config.decoder_start_token_id, dtype=torch.long, device=device)
    states_BPD = state.start(torch.cat([mask_token, levels.prefix]))
    hidden_BKD = states_BPD[:, -1:]
    scores_BK = _prefix_score(states_BPD[:, :-1], levels, heads)
    nodes_BK = torch.full((num_users, 1), levels.num_forced, dtype=torch.long, device=device)
    found_scores_BN, found_nodes_BN = scores_BK[:, :0], nodes_BK[:, :0]
    for level in range(levels.num_forced, levels.depth + 1):
        reached_BKV = log_probabilities(heads, level, hidden_BKD).add_(scores_BK[..., None])
        ends_BK = _ended(reached_BKV[..., 0], nodes_BK, levels, lost, level, static)
        if level < levels.depth:
            reached_BX, children_BX = _children(reached_BKV, nodes_BK, levels, lost, level, static)
            if ends == "ranked":
                candidates_BX = torch.cat([reached_BX, ends_BK], 1)
                least_B1 = candidates_BX.topk(min(beam, candidates_BX.shape[1])).values[:, -1:]
                ends_BK = ends_BK.masked_fill(ends_BK < least_B1, NOTHING)
        found_scores_BN, found_nodes_BN, _ = best(
            torch.cat([found_scores_BN, ends_BK], 1), torch.cat([found_nodes_BN, nodes_BK], 1), top
        )
        if level == levels.depth:
            break
        scores_BK, nodes_BK, places_BK = best(reached_BX, children_BX, beam)
        parent_BK = places_BK // levels.fans[level]
        if not static:
            num_open = num_open_beams(scores_BK, found_scores_BN, top)
            if num_open == 0:
                break
            scores_BK, nodes_BK, parent_BK = scores_BK[:, :num_open], nodes_BK[:, :num_open], parent_BK[:, :num_open]
        if level > levels.num_forced:
            state.follow(parent_BK)
        hidden_BKD = state.step(levels.token[nodes_BK])
    return found_scores_BN, found_nodes_BN


def _prefix_score(states_BPD: Tensor, levels: Levels, heads: Heads) -> Tensor:
    """Log-probability [B, 1] of the tokens that all items begin with."""
    total_B1 = states_BPD.new_zeros(len(states_BPD), 1, dtype=heads.levels[0].dtype)
    for level in range(levels.num_forced):
        total_B1 += log_probabilities(heads, level, states_BPD[:, level : level + 1])[..., 1]
    return total_B1


def _ended(ends_BK: Tensor, nodes_BK: Tensor, levels: Levels, lost: Lost | None, level: int, static: bool) -> Tensor:
    """-inf where no item ends at a beam's node, or an excluded one."""
    ends_BK = ends_BK.masked_fill(levels.end_item[nodes_BK] < 0, NOTHING)
    if lost is None:
        return ends_BK
    users_X, nodes_X = lost.ends[level]
    match_XK = nodes_BK[users_X] == nodes_X[:, None]
    return _without(ends_BK[..., None], users_X, match_XK, torch.zeros_like(users_X), static)[..., 0]


def _children(
    scores_BKV: Tensor,
    nodes_BK: Tensor,
    levels: Levels,
    lost: Lost | None,
    level: int,
    static: bool,
) -> tuple[Tensor, Tensor]:
    """(scores, nodes) of the children of all beams, [B, K * C]; `scores_BKV` are used up.

    A place without a child stands nowhere with a score of -inf, which no token can raise again.
    """
    fan = levels.fans[level]
    if levels.num_nodes[level] == 1:
        # All users stand at one node, whose children are all of the next level, in the order of its logits.
        reached_BKC = scores_BKV[..., 1:]
        first = levels.first_nodes[level + 1]
        children_BKC = torch.arange(first, first + fan, device=nodes_BK.device).expand_as(reached_BKC)
    else:
        columns_C = torch.arange(fan, device=nodes_BK.device)
        exists_BKC = columns_C < levels.num_children[nodes_BK][..., None]
        children_BKC = (levels.first_child[nodes_BK][..., None] + columns_C).where(exists_BKC, levels.nowhere)
        reached_BKC = scores_BKV.gather(2, levels.column[children_BKC].flatten(2)).masked_fill_(~exists_BKC, NOTHING)
    if lost is not None:
        users_X, parents_X, places_X = lost.dead[level + 1]
        match_XK = nodes_BK[users_X] == parents_X[:, None]
        reached_BKC = _without(reached_BKC, users_X, match_XK, places_X, static)
    return reached_BKC.flatten(1), children_BKC.flatten(1)


def _without(scores_BKC: Tensor, users_X: Tensor, match_XK: Tensor, places_X: Tensor, static: bool) -> Tensor:
    """-inf at the child `places_X` of the beam that a pair meets, in place where it may be."""
    if not static:
        pair, beam = match_XK.nonzero(as_tuple=True)
        scores_BKC[users_X[pair], beam, places_X[pair]] = NOTHING
        return scores_BKC
    # A pair that meets no beam writes into a spare place.
    num_beams, fan = scores_BKC.shape[1:]
    beams_K = torch.arange(num_beams, device=scores_BKC.device)
    index_XK = ((users_X[:, None] * num_beams + beams_K) * fan + places_X[:, None]).where(match_XK, scores_BKC.numel())
    spare = F.pad(scores_BKC.flatten(), (0, 1)).index_fill_(0, index_XK.flatten(), NOTHING)
    return spare[:-1].view(scores_BKC.shape)


def num_open_beams(scores_BK: Tensor, found_scores_BN: Tensor, top: int) -> int:
    """Beams, best first, that can still change some user's list: scores only fall, and a tie goes to what is found."""
    full = found_scores_BN.shape[1] == top
    open_BK = scores_BK > (found_scores_BN[:, -1:] if full else NOTHING)
    return int(open_BK.sum(dim=1).max())


def best_of(scores_BX: Tensor, nodes_BX: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, nodes, places) [B, count] of the highest scores a row, equal ones by smaller node.

    `topk` leaves open which of equal scores it takes. One place more than asked for tells whether that matters at the
    edge; only then all places are sorted.
    """
    count = min(count, scores_BX.shape[1])
    kept, places = scores_BX.topk(min(count + 1, scores_BX.shape[1]))
    if kept.shape[1] > count:
        tied = (kept[:, -1] == kept[:, -2]) & (kept[:, -1] > NOTHING)
        if tied.any():
            places = torch.arange(scores_BX.shape[1], device=places.device).expand_as(scores_BX)
            kept = scores_BX
        else:
            kept, places = kept[:, :count], places[:, :count]
    by_node = nodes_BX.gather(1, places).argsort(dim=1, stable=True)
    by_score = kept.gather(1, by_node).argsort(dim=1, descending=True, stable=True)
    order = by_node.gather(1, by_score)[:, :count]
    places = places.gather(1, order)
    return kept.gather(1, order), nodes_BX.gather(1, places), places


def best_static(scores_BX: Tensor, nodes_BX: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `best_of`, without looking at a value: a float32 score and its node are one whole number, and no two are equal."""
    assert scores_BX.dtype == torch.float32, "a float64 score leaves no room for its node"
    count = min(count, scores_BX.shape[1])
    bits = (scores_BX + 0.0).view(torch.int32)  # no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    words = (ordered.long() << 32) | (0xFFFFFFFF - nodes_BX)
    places = words.topk(count).indices
    return scores_BX.gather(1, places), nodes_BX.gather(1, places), places
