"""Beam search down the item trie, in tensors."""

# B users, K beams, X candidates or pairs, P prefix tokens, L input tokens, D width, M nodes,
# V tokens of a level, N list

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.decoding.decoder_state import Searchable, start_search
from genrec_dist.decoding.levels import Excluded, Levels
from genrec_dist.decoding.output_head import Heads, log_probabilities

Ends = Literal["kept", "ranked"]
"""What becomes of an item that ends at a beam. kept: it is a candidate for the list. ranked: only
if it is among the `beam` best candidates of its step, continuations included, as in Hugging Face's
`generate`."""

Lookup = Callable[[Tensor], Tensor]
"""From places [B, n] among a user's candidates to what is there."""

NEG_INF = float("-inf")


@dataclass(frozen=True)
class BeamOptions:
    beam: int
    """Partial items that are kept per user and level."""
    top: int
    """Length of the lists."""
    ends: Ends = "kept"
    static: bool = False
    """The same operators in the same shapes for all users of a batch's size."""


def search_trie(
    model: Searchable,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    excluded: Excluded | None,
    options: BeamOptions,
) -> tuple[Tensor, Tensor]:
    """The best items of each user by the log-probability of their tokens and `</s>`.

    Args:
        model: Whose decoder scores the items.
        levels: The trie.
        heads: What decoder states are multiplied with.
        memory_BLD: Encoder states.
        mask_BL: bool, False on padding.
        excluded: What each user must not be listed.
        options: Widths and rules of the search.

    Returns:
        (scores, nodes where the items end) [B, N], best first, equal ones by smaller node; -inf
        where there is no item.
    """
    # Items a: (5, 6), b: (5, 7), c: (8,) are nodes 1: 5, 2: 8, 3: 5 6, 4: 5 7. Two beams, one user:
    #   level 0  nodes_BK [[0]]     no item ends at the root; children: 1 at -0.2, 2 at -1.9
    #   level 1  nodes_BK [[1, 2]]  no item ends at node 1, c ends at node 2: found at -2.0
    #                               children: of node 1 3 at -0.9 and 4 at -1.0, of node 2 none
    #   level 2  nodes_BK [[3, 4]]  a and b end here: found are a -1.0, b -1.1, c -2.0
    # Both beams of level 2 continue beam 0 of level 1: parent_BK is [[0, 0]].
    beam, top, static = options.beam, options.top, options.static
    best = best_static if static else best_of
    num_users, device = len(memory_BLD), memory_BLD.device
    state = start_search(model, memory_BLD, mask_BL, static=static)
    states_BPD = state.start(torch.cat([state.start_token, levels.prefix]))
    hidden_BKD = states_BPD[:, -1:]
    scores_BK = states_BPD.new_zeros(num_users, 1, dtype=heads.levels[0].dtype)
    for level in filter(levels.needs_logits.__getitem__, range(levels.num_prefix)):
        # A level with one node: its number is that of the level.
        nodes_BK = torch.full((num_users, 1), level, dtype=torch.long, device=device)
        hidden_B1D = states_BPD[:, level : level + 1]
        logprob_B1V = step_log_probabilities(levels, heads, level, hidden_B1D, nodes_BK)
        scores_BK += logprob_B1V[..., levels.prefix_columns[level]]
    nodes_BK = torch.full((num_users, 1), levels.num_prefix, dtype=torch.long, device=device)
    found_scores_BN, found_nodes_BN = scores_BK[:, :0], nodes_BK[:, :0]
    open_BK = None
    for level in range(levels.num_prefix, levels.depth + 1):
        reached_BKV = step_log_probabilities(levels, heads, level, hidden_BKD, nodes_BK, open_BK)
        reached_BKV = reached_BKV.add_(scores_BK[..., None])
        ends_BK = _ended(reached_BKV[..., 0], nodes_BK, levels, excluded, level, static)
        if level < levels.depth:
            children = _children(reached_BKV, nodes_BK, levels, excluded, level, static)
            if options.ends == "ranked":
                candidates_BX = torch.cat([children.scores_BX, ends_BK], 1)
                least_B1 = candidates_BX.topk(min(beam, candidates_BX.shape[1])).values[:, -1:]
                ends_BK = ends_BK.masked_fill(ends_BK < least_B1, NEG_INF)
        found_scores_BX = torch.cat([found_scores_BN, ends_BK], 1)
        found_nodes_BX = torch.cat([found_nodes_BN, nodes_BK], 1)
        found_scores_BN, found_nodes_BN, _ = best(
            found_scores_BX, partial(found_nodes_BX.gather, 1), top
        )
        if level == levels.depth:
            break
        scores_BK, nodes_BK, places_BK = best(children.scores_BX, children.node_at, beam)
        parent_BK = children.beam_at(places_BK)
        if not static:
            open_BK = open_beams(scores_BK, found_scores_BN, top)
            num_B = open_BK.sum(dim=1)
            least, num_open = torch.stack((num_B.min(), num_B.max())).tolist()
            if num_open == 0:
                break
            scores_BK = scores_BK.masked_fill(~open_BK, NEG_INF)[:, :num_open]
            nodes_BK, parent_BK = nodes_BK[:, :num_open], parent_BK[:, :num_open]
            open_BK = open_BK[:, :num_open] if least < num_open else None
        if level + 1 < levels.num_decoded:
            if level > levels.num_prefix:
                state.reorder_beams(parent_BK)
            hidden_BKD = state.step(levels.token[nodes_BK], open_BK)
    return found_scores_BN, found_nodes_BN


def step_log_probabilities(
    levels: Levels,
    heads: Heads,
    level: int,
    hidden_BKD: Tensor,
    nodes_BK: Tensor,
    open_BK: Tensor | None = None,
) -> Tensor:
    """[B, K, 1 + V_l], fresh, of `</s>` and the tokens of a level after these nodes.

    0 after forced ones, whose one continuation is all that is read. Where a level needs no logits,
    `hidden_BKD` [B, .., D] may be any. `open_BK`: bool, beams that are asked for, others get any
    finite number; None: all.
    """
    if not levels.needs_logits[level]:
        weight_VD = heads.levels[level]
        return hidden_BKD.new_zeros(*nodes_BK.shape, len(weight_VD), dtype=weight_VD.dtype)
    if heads.siblings is not None:
        assert levels.whole_node is not None
        whole_BK = levels.whole_node[nodes_BK]
        logprob_BKV = heads.siblings.log_probabilities(level, hidden_BKD, whole_BK)
    elif open_BK is None:
        logprob_BKV = log_probabilities(heads, level, hidden_BKD)
    else:
        logprob_nV = log_probabilities(heads, level, hidden_BKD[open_BK])
        logprob_BKV = logprob_nV.new_zeros(*nodes_BK.shape, logprob_nV.shape[-1])
        logprob_BKV[open_BK] = logprob_nV
    if levels.forced is not None:
        logprob_BKV = logprob_BKV.masked_fill(levels.forced[nodes_BK][..., None], 0.0)
    return logprob_BKV


def _ended(
    ends_BK: Tensor,
    nodes_BK: Tensor,
    levels: Levels,
    excluded: Excluded | None,
    level: int,
    static: bool,
) -> Tensor:
    """-inf where no item ends at a beam's node, or an excluded one."""
    if not levels.has_ends[level]:
        return torch.full_like(ends_BK, NEG_INF)
    ends_BK = ends_BK.masked_fill(levels.end_item[nodes_BK] < 0, NEG_INF)
    if excluded is None or not len(excluded.ends[level][0]):
        return ends_BK
    users_X, nodes_X = excluded.ends[level]
    match_XK = nodes_BK[users_X] == nodes_X[:, None]
    beams_K = torch.arange(nodes_BK.shape[1], device=nodes_BK.device)
    return _strike(ends_BK, users_X, match_XK, beams_K.expand_as(match_XK), static)


class Children(NamedTuple):
    """The children of a user's beams as candidates; a place without one has the sentinel node and
    -inf, which no token can raise again."""

    scores_BX: Tensor
    node_at: Lookup
    beam_at: Lookup
    """The parents' beams."""
    place_of: Callable[[Tensor, Tensor, Tensor], Tensor]
    """From pairs (users, parents, nodes) to places [X, K], for each beam that may be the parent."""


def _children(
    scores_BKV: Tensor,
    nodes_BK: Tensor,
    levels: Levels,
    excluded: Excluded | None,
    level: int,
    static: bool,
) -> Children:
    """The children of the beams without the excluded ones; `scores_BKV` as of
    `step_log_probabilities`."""
    if levels.num_nodes[level] == 1 and scores_BKV.shape[2] == levels.num_nodes[level + 1] + 1:
        # All beams are at one node, and the level below it is all of its children, by token.
        first = levels.first_nodes[level + 1]
        children = Children(
            scores_BX=scores_BKV[:, 0, 1:],
            node_at=lambda places_BN: places_BN + first,
            beam_at=torch.zeros_like,
            place_of=lambda users_X, parents_X, nodes_X: (nodes_X - first)[:, None],
        )
    else:
        children = _children_by_number(scores_BKV, nodes_BK, levels, level, static)
    if excluded is None:
        return children
    users_X, parents_X, pruned_X = excluded.pruned[level + 1]
    match_XK = nodes_BK[users_X] == parents_X[:, None]
    places_XK = children.place_of(users_X, parents_X, pruned_X)
    left_BX = _strike(children.scores_BX, users_X, match_XK, places_XK, static)
    return children._replace(scores_BX=left_BX)


def _children_by_number(
    scores_BKV: Tensor, nodes_BK: Tensor, levels: Levels, level: int, static: bool
) -> Children:
    """The children of one beam after those of another: siblings have consecutive numbers."""
    # Beams at nodes 1, 2, 3 with children 4 5, none, 6: counts [2, 0, 1], ends [2, 2, 3], starts
    # [0, 2, 2]. Places 0, 1, 2 belong to beams 0, 0, 2, by how many beams end at or before them;
    # their nodes are first_child - start + place: 4 - 0 + 0, 4 - 0 + 1, 6 - 2 + 2.
    num_beams = nodes_BK.shape[1]
    counts_BK = levels.num_children[nodes_BK]
    ends_BK = counts_BK.cumsum(1)
    starts_BK = ends_BK - counts_BK
    most = int(ends_BK[:, -1].max()) if not static else levels.num_nodes[level + 1]
    if static and num_beams <= len(levels.most_children[level]):
        most = levels.most_children[level][num_beams - 1]
    places_X = torch.arange(most, device=nodes_BK.device)
    exists_BX = places_X < ends_BK[:, -1:]
    beams_BX = torch.zeros(len(nodes_BK), most + 1, dtype=torch.long, device=nodes_BK.device)
    beams_BX = beams_BX.scatter_add_(1, ends_BK, torch.ones_like(ends_BK))[:, :-1].cumsum(1)
    beams_BX.clamp_(max=num_beams - 1)
    children_BX = (levels.first_child[nodes_BK] - starts_BK).gather(1, beams_BX).add_(places_X)
    children_BX.masked_fill_(~exists_BX, levels.sentinel)
    columns_BX = levels.column[children_BX].add_(beams_BX, alpha=scores_BKV.shape[2])
    return Children(
        scores_BX=scores_BKV.flatten(1).gather(1, columns_BX).masked_fill_(~exists_BX, NEG_INF),
        node_at=partial(children_BX.gather, 1),
        beam_at=partial(beams_BX.gather, 1),
        place_of=lambda users_X, parents_X, nodes_X: (
            starts_BK[users_X] + (nodes_X - levels.first_child[parents_X])[:, None]
        ),
    )


def _strike(
    scores_BX: Tensor, users_X: Tensor, match_XK: Tensor, places_XK: Tensor, static: bool
) -> Tensor:
    """-inf at the place [X, K] in a user's row wherever a pair matches a beam; in the tensor itself
    unless static."""
    if not static:
        pair, beam = match_XK.nonzero(as_tuple=True)
        scores_BX[users_X[pair], places_XK[pair, beam]] = NEG_INF
        return scores_BX
    # A pair that matches no beam writes into a spare place.
    index_XK = users_X[:, None] * scores_BX.shape[1] + places_XK
    index_XK = index_XK.where(match_XK, scores_BX.numel())
    spare = F.pad(scores_BX.flatten(), (0, 1)).index_fill_(0, index_XK.flatten(), NEG_INF)
    return spare[:-1].view(scores_BX.shape)


def open_beams(scores_BK: Tensor, found_scores_BN: Tensor, top: int) -> Tensor:
    """bool [B, K], beams that can still change their user's list, the first ones of each: scores
    only fall, and a tie goes to what is found."""
    full = found_scores_BN.shape[1] == top
    return scores_BK > (found_scores_BN[:, -1:] if full else NEG_INF)


def best_of(scores_BX: Tensor, node_at: Lookup, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, nodes, places) [B, count] of the highest scores of a row, equal ones by smaller
    node.

    `topk` leaves open which of equal scores it takes. One place more than needed shows whether that
    matters at the edge; only then all places are sorted.
    """
    count = min(count, scores_BX.shape[1])
    kept, places = scores_BX.topk(min(count + 1, scores_BX.shape[1]))
    if kept.shape[1] > count:
        tied = (kept[:, -1] == kept[:, -2]) & (kept[:, -1] > NEG_INF)
        if tied.any():
            kept, places = scores_BX, _all_places(scores_BX)
        else:
            kept, places = kept[:, :count], places[:, :count]
    nodes = node_at(places)
    by_node = nodes.argsort(dim=1, stable=True)
    by_score = kept.gather(1, by_node).argsort(dim=1, descending=True, stable=True)
    order = by_node.gather(1, by_score)[:, :count]
    return kept.gather(1, order), nodes.gather(1, order), places.gather(1, order)


def best_static(scores_BX: Tensor, node_at: Lookup, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `best_of`, without looking at a value: a float32 score and its node are one whole number,
    and no two are equal."""
    assert scores_BX.dtype == torch.float32, "a float64 score leaves no room for its node"
    count = min(count, scores_BX.shape[1])
    bits = (scores_BX + 0.0).view(torch.int32)  # no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    nodes_BX = node_at(_all_places(scores_BX))
    words = (ordered.long() << 32) | (0xFFFFFFFF - nodes_BX)
    places = words.topk(count).indices
    return scores_BX.gather(1, places), nodes_BX.gather(1, places), places


def _all_places(scores_BX: Tensor) -> Tensor:
    return torch.arange(scores_BX.shape[1], device=scores_BX.device).expand(scores_BX.shape)
