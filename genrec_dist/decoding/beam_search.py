"""The walk of a beam down the item trie, in tensors."""

# B users, K beams, C children, X candidates or pairs, P prefix tokens, L input tokens, D width, V
# tokens of a level, N list

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.decoding.output_head import Heads, log_probabilities
from genrec_dist.decoding.trie import Pruned, Trie
from genrec_dist.model.genrec import GenRecForConditionalGeneration

Ends = Literal["kept", "ranked"]
"""What becomes of an item that ends at a beam. kept: it is a candidate for the list. ranked: only
if it stands among the `beam` best candidates of its step, continuations included, as Hugging Face's
`generate` has it."""

PlacesTo = Callable[[Tensor], Tensor]
"""From places [B, n] among a user's candidates to what stands there."""
Children = tuple[Tensor, PlacesTo, PlacesTo, Callable[[Tensor, Tensor, Tensor], Tensor]]
"""Scores [B, X]; nodes and parent beams at places; places [X, K] of (users, parents, nodes) for
every beam the user might have."""

NEG_INF = float("-inf")
TABLE_ENTRIES, TABLE_WIDTH = 2**22, 1024
"""A level has a table of parents and tokens up to this size (nine bytes an entry) and while its
rows are short; otherwise children are found by their numbers."""
MOST_BEAMS = 1024
"""Up to so many beams a static search knows how many children they can have; for more it makes room
for a whole level."""
FEWEST_PAIRS = 256
"""What a static search pads the exclusions of a level to at least."""


class Levels:
    """The trie as a search reads it, level by level, on its device."""

    def __init__(self, trie: Trie, device: torch.device, certain: np.ndarray | None = None):
        """`certain`: bool [M], nodes behind which the next token or end has probability 1; None:
        all are the model's to say."""

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.depth = trie.depth
        self.sentinel = trie.num_nodes
        """A node that is none: where a beam stands that has no child to go to. Nothing ends or
        continues there."""
        self.token = move(np.append(trie.token.astype(np.int64).clip(min=0), 0))
        self.first_child = move(np.append(trie.first_child, 0))
        self.num_children = move(np.append(trie.num_children, 0))
        self.end_item = move(np.append(trie.end_item.astype(np.int64), -1))
        self.families = [
            np.cumsum(-np.sort(-trie.num_children[first:last]))[:MOST_BEAMS].tolist()
            for first, last in pairwise(trie.level_offsets)
        ]
        """Children that so many different nodes of a level (one, two, ...) can have together, by
        level."""
        self.has_ends = [
            bool((trie.end_item[first:last] >= 0).any())
            for first, last in pairwise(trie.level_offsets)
        ]
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
        """int64 [M], where a node's token stands in the logits of the level above, behind `</s>` at
        0."""
        self._make_tables(trie, column, move)
        self.certain = None if certain is None else move(np.append(certain, True))
        open_nodes = np.ones(trie.num_nodes, bool) if certain is None else ~certain
        self.needs_logits = [
            bool(open_nodes[first:last].any()) for first, last in pairwise(trie.level_offsets)
        ]
        """Whether the model is asked at a level."""
        self.num_asked = max(
            (level + 1 for level, asked in enumerate(self.needs_logits) if asked), default=0
        )
        """Levels from the root on behind which the model is not asked any more."""
        self.num_forced = _num_forced(trie)
        self.prefix = self.token[1 : self.num_forced + 1]
        """int64, the tokens that all items begin with."""

    def _make_tables(
        self, trie: Trie, column: np.ndarray, move: Callable[[np.ndarray], Tensor]
    ) -> None:
        """Which token leads to which child, by parent with children: row 0 has none and is
        everybody else's."""
        row = np.zeros(trie.num_nodes + 1, np.int64)
        self.child_tables: list[Tensor | None] = []
        """int64 [1 + parents, V_l] a level: the child behind a token, `sentinel` if there is
        none."""
        for level, (first, last) in enumerate(pairwise(trie.level_offsets)):
            parents = first + np.flatnonzero(trie.num_children[first:last])
            row[parents] = 1 + np.arange(len(parents))
            shape = (1 + len(parents), len(self.tokens[level]))
            if shape[0] * shape[1] > TABLE_ENTRIES or shape[1] > TABLE_WIDTH:
                self.child_tables.append(None)
                continue
            table = np.full(shape, self.sentinel, np.int64)
            children = (
                np.arange(*trie.level_offsets[level + 1 : level + 3])
                if shape[1]
                else np.empty(0, np.int64)
            )
            table[row[trie.parent[children]], column[children] - 1] = children
            self.child_tables.append(move(table))
        self.absent_tables = [
            None if table is None else table == self.sentinel for table in self.child_tables
        ]
        self.row = move(row)
        """int64 [M + 1], a node's row in its level's table."""

    def most_children(self, level: int, num_beams: int) -> int:
        """Children that so many different nodes of a level can have together."""
        families = self.families[level]
        return families[num_beams - 1] if num_beams <= len(families) else self.num_nodes[level + 1]


def _num_forced(trie: Trie) -> int:
    """Levels from the root on at whose one node no item ends and one token follows."""
    forced = 0
    while forced < trie.depth and trie.num_children[forced] == 1 and trie.end_item[forced] < 0:
        forced += 1
    return forced


@dataclass(frozen=True)
class Excluded:
    """What exclusion takes, by level, on the searcher's device."""

    ends: list[tuple[Tensor, Tensor]]
    """(users, nodes) int64 [X] where the item of a node with children is excluded."""
    pruned: list[tuple[Tensor, Tensor, Tensor]]
    """(users, parents, nodes) int64 [X] of the nodes below which nothing is left."""


def exclude_by_level(trie: Trie, pairs: Pruned, device: torch.device, padded: bool) -> Excluded:
    def at_level(
        users: np.ndarray, nodes: np.ndarray, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        here = (nodes >= first) & (nodes < last)
        return users[here], nodes[here]

    def move(*columns: np.ndarray) -> tuple[Tensor, ...]:
        # Padded to few sizes; a pair of padding names a node that no beam stands at.
        size = (
            max(FEWEST_PAIRS, 1 << (len(columns[0]) - 1).bit_length())
            if padded
            else len(columns[0])
        )
        filled = [np.full(size, fill, np.int64) for fill in (0, -1, 0)[: len(columns)]]
        for whole, column in zip(filled, columns, strict=True):
            whole[: len(column)] = column
        return tuple(torch.from_numpy(column).to(device, non_blocking=True) for column in filled)

    inner = trie.num_children[pairs.end_nodes] > 0
    end_users, end_nodes = pairs.end_users[inner], pairs.end_nodes[inner]
    ends, pruned = [], []
    for first, last in pairwise(trie.level_offsets):
        ends.append(move(*at_level(end_users, end_nodes, first, last)))
        users, nodes = at_level(pairs.pruned_users, pairs.pruned_nodes, first, last)
        pruned.append(move(users, trie.parent[nodes], nodes))
    return Excluded(ends, pruned)  # type: ignore[arg-type]


def walk(
    model: GenRecForConditionalGeneration,
    levels: Levels,
    heads: Heads,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    excluded: Excluded | None,
    *,
    beam: int,
    top: int,
    ends: Ends,
    static: bool,
) -> tuple[Tensor, Tensor]:
    """(scores, nodes) of the best `top` items a user, [B, N]. With `static` the same operators in
    the same shapes for all users."""
    best = best_static if static else best_of
    num_users, device = len(memory_BLD), memory_BLD.device
    state = DecoderState(model, memory_BLD, mask_BL, static=static)
    mask_token = torch.full(
        (1,), model.config.decoder_start_token_id, dtype=torch.long, device=device
    )
    states_BPD = state.start(torch.cat([mask_token, levels.prefix]))
    hidden_BKD = states_BPD[:, -1:]
    scores_BK = _prefix_score(states_BPD[:, :-1], levels, heads)
    nodes_BK = torch.full((num_users, 1), levels.num_forced, dtype=torch.long, device=device)
    found_scores_BN, found_nodes_BN = scores_BK[:, :0], nodes_BK[:, :0]
    for level in range(levels.num_forced, levels.depth + 1):
        reached_BKV = step_log_probabilities(levels, heads, level, hidden_BKD, nodes_BK).add_(
            scores_BK[..., None]
        )
        ends_BK = _ended(reached_BKV[..., 0], nodes_BK, levels, excluded, level, static)
        if level < levels.depth:
            reached_BX, child_at, beam_at = _children(
                reached_BKV, nodes_BK, levels, excluded, level, static
            )
            if ends == "ranked":
                candidates_BX = torch.cat([reached_BX, ends_BK], 1)
                least_B1 = candidates_BX.topk(min(beam, candidates_BX.shape[1])).values[:, -1:]
                ends_BK = ends_BK.masked_fill(ends_BK < least_B1, NEG_INF)
        candidates_BX = torch.cat([found_nodes_BN, nodes_BK], 1)
        found_scores_BN, found_nodes_BN, _ = best(
            torch.cat([found_scores_BN, ends_BK], 1), partial(candidates_BX.gather, 1), top
        )
        if level == levels.depth:
            break
        scores_BK, nodes_BK, places_BK = best(reached_BX, child_at, beam)
        parent_BK = beam_at(places_BK)
        if not static:
            num_open = num_open_beams(scores_BK, found_scores_BN, top)
            if num_open == 0:
                break
            scores_BK, nodes_BK, parent_BK = (
                scores_BK[:, :num_open],
                nodes_BK[:, :num_open],
                parent_BK[:, :num_open],
            )
        if level + 1 < levels.num_asked:
            if level > levels.num_forced:
                state.follow(parent_BK)
            hidden_BKD = state.step(levels.token[nodes_BK])
    return found_scores_BN, found_nodes_BN


def step_log_probabilities(
    levels: Levels, heads: Heads, level: int, hidden_BKD: Tensor, nodes_BK: Tensor
) -> Tensor:
    """[B, K, 1 + V_l], fresh, of `</s>` and the tokens of a level behind these nodes; 0 behind
    certain ones, where the one that can follow is all that is looked at. Where the model is not
    asked, `hidden_BKD` [B, .., D] may be any."""
    if not levels.needs_logits[level]:
        return hidden_BKD.new_zeros(
            *nodes_BK.shape, len(heads.levels[level]), dtype=heads.levels[level].dtype
        )
    logprob_BKV = log_probabilities(heads, level, hidden_BKD)
    if levels.certain is not None:
        logprob_BKV = logprob_BKV.masked_fill(levels.certain[nodes_BK][..., None], 0.0)
    return logprob_BKV


def _prefix_score(states_BPD: Tensor, levels: Levels, heads: Heads) -> Tensor:
    """Log-probability [B, 1] of the tokens that all items begin with."""
    total_B1 = states_BPD.new_zeros(len(states_BPD), 1, dtype=heads.levels[0].dtype)
    for level in filter(levels.needs_logits.__getitem__, range(levels.num_forced)):
        total_B1 += log_probabilities(heads, level, states_BPD[:, level : level + 1])[..., 1]
    return total_B1


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
    return _without(ends_BK, users_X, match_XK, beams_K.expand_as(match_XK), static)


def _children(
    scores_BKV: Tensor,
    nodes_BK: Tensor,
    levels: Levels,
    excluded: Excluded | None,
    level: int,
    static: bool,
) -> tuple[Tensor, PlacesTo, PlacesTo]:
    """Scores [B, X] of the children of a user's beams, and what stands at given places [B, n] of
    them: nodes, parent beams.

    A place without a child has the sentinel node and a score of -inf, which no token can raise again.
    """
    absent_RV, table_RV = levels.absent_tables[level], levels.child_tables[level]
    if levels.num_nodes[level] == 1:
        reached_BX, child_at, beam_at, place_of = _of_one_node(scores_BKV, levels, level)
    elif absent_RV is not None and table_RV is not None:
        reached_BX, child_at, beam_at, place_of = _by_table(
            scores_BKV, levels.row[nodes_BK], absent_RV, table_RV, levels
        )
    else:
        reached_BX, child_at, beam_at, place_of = _by_number(
            scores_BKV, nodes_BK, levels, level, static
        )
    if excluded is not None:
        users_X, parents_X, pruned_X = excluded.pruned[level + 1]
        match_XK = nodes_BK[users_X] == parents_X[:, None]
        reached_BX = _without(
            reached_BX, users_X, match_XK, place_of(users_X, parents_X, pruned_X), static
        )
    return reached_BX, child_at, beam_at


def _of_one_node(scores_BKV: Tensor, levels: Levels, level: int) -> Children:
    """All users stand at one node, whose children are all of the next level, in the order of its
    logits."""
    first = levels.first_nodes[level + 1]
    return (
        scores_BKV[:, 0, 1:],
        lambda places_BN: places_BN + first,
        torch.zeros_like,
        lambda users_X, parents_X, nodes_X: (nodes_X - first)[:, None],
    )


def _by_table(
    scores_BKV: Tensor, rows_BK: Tensor, absent_RV: Tensor, table_RV: Tensor, levels: Levels
) -> Children:
    """Every token of the level a candidate of every beam, -inf where it leads nowhere."""
    width = table_RV.shape[1]
    reached_BKV = scores_BKV[..., 1:].masked_fill(absent_RV[rows_BK], NEG_INF)
    beams_K = torch.arange(rows_BK.shape[1], device=rows_BK.device)
    return (
        reached_BKV.flatten(1),
        lambda places_BN: table_RV[rows_BK.gather(1, places_BN // width), places_BN % width],
        lambda places_BN: places_BN // width,
        lambda users_X, parents_X, nodes_X: beams_K * width + (levels.column[nodes_X] - 1)[:, None],
    )


def _by_number(
    scores_BKV: Tensor, nodes_BK: Tensor, levels: Levels, level: int, static: bool
) -> Children:
    """The children of one beam after those of another: siblings are numbered one after another."""
    counts_BK = levels.num_children[nodes_BK]
    ends_BK = counts_BK.cumsum(1)
    starts_BK = ends_BK - counts_BK
    most = levels.most_children(level, nodes_BK.shape[1]) if static else int(ends_BK[:, -1].max())
    places_X = torch.arange(most, device=nodes_BK.device)
    exists_BX = places_X < ends_BK[:, -1:]
    # A place belongs to the beam whose number is that of the beams that end before it.
    beams_BX = torch.zeros(len(nodes_BK), most + 1, dtype=torch.long, device=nodes_BK.device)
    beams_BX = beams_BX.scatter_add_(1, ends_BK, torch.ones_like(ends_BK))[:, :-1].cumsum(1)
    beams_BX.clamp_(max=nodes_BK.shape[1] - 1)
    children_BX = (levels.first_child[nodes_BK] - starts_BK).gather(1, beams_BX).add_(places_X)
    children_BX.masked_fill_(~exists_BX, levels.sentinel)
    columns_BX = levels.column[children_BX].add_(beams_BX, alpha=scores_BKV.shape[2])
    return (
        scores_BKV.flatten(1).gather(1, columns_BX).masked_fill_(~exists_BX, NEG_INF),
        partial(children_BX.gather, 1),
        partial(beams_BX.gather, 1),
        lambda users_X, parents_X, nodes_X: (
            starts_BK[users_X] + (nodes_X - levels.first_child[parents_X])[:, None]
        ),
    )


def _without(
    scores_BX: Tensor, users_X: Tensor, match_XK: Tensor, places_XK: Tensor, static: bool
) -> Tensor:
    """-inf at the place [X, K] in a user's row of the beam that a pair meets, in the tensor itself
    where it may be."""
    if not static:
        pair, beam = match_XK.nonzero(as_tuple=True)
        scores_BX[users_X[pair], places_XK[pair, beam]] = NEG_INF
        return scores_BX
    # A pair that meets no beam writes into a spare place.
    index_XK = (users_X[:, None] * scores_BX.shape[1] + places_XK).where(
        match_XK, scores_BX.numel()
    )
    spare = F.pad(scores_BX.flatten(), (0, 1)).index_fill_(0, index_XK.flatten(), NEG_INF)
    return spare[:-1].view(scores_BX.shape)


def num_open_beams(scores_BK: Tensor, found_scores_BN: Tensor, top: int) -> int:
    """Beams, best first, that can still change some user's list: scores only fall, and a tie goes
    to what is found."""
    full = found_scores_BN.shape[1] == top
    open_BK = scores_BK > (found_scores_BN[:, -1:] if full else NEG_INF)
    return int(open_BK.sum(dim=1).max())


def best_of(scores_BX: Tensor, node_at: PlacesTo, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, nodes, places) [B, count] of the highest scores a row, equal ones by smaller node.

    `topk` leaves open which of equal scores it takes. One place more than asked for tells whether
    that matters at the edge; only then all places are sorted."""
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


def best_static(scores_BX: Tensor, node_at: PlacesTo, count: int) -> tuple[Tensor, Tensor, Tensor]:
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
