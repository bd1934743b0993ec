"""Beam search over the item trie."""

# B users, K beams, C children, X candidates or pairs, P prefix tokens, L input tokens, D width, V tokens of a softmax, N list

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.batch import EncoderInput
from genrec_dist.decoder import DecoderState
from genrec_dist.head import Softmax
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.tokens import ItemTexts
from genrec_dist.trie import Pruned, Trie, pruned

Mode = Literal["exact", "compact", "free", "all"]
"""exact: the trie's items by log-probability under the model's whole softmax. compact: the softmax over the trie's tokens and
`</s>` alone, another and cheaper normaliser. free: no trie, as the paper decodes; what is generated may be no item.
all: every item scored, the oracle of `exact`."""

Ends = Literal["kept", "ranked"]
"""What becomes of an item that ends at a beam. kept: it is a candidate for the list. ranked: only if it stands among the
`beam` best candidates of its step, continuations included, as Hugging Face's `generate` has it."""

NOTHING = float("-inf")
USERS_ENCODED_AT_ONCE = 8
"""Rows of like length that an encoder pass on a CPU takes at least."""


@dataclass(frozen=True)
class TopItems:
    items: np.ndarray
    """int32 [B, N] item rows, best first; -1 behind the end of a short list, -2 for a text (mode `free`) that is no item."""
    scores: np.ndarray
    """float32 [B, N] log-probabilities of the items' token strings, `</s>` included."""


class TrieSearcher:
    """A trie on a device, ready to decode batches of users with one model.

    The head's rows are gathered when the searcher is made: after a change of the weights make another with `of`.
    """

    def __init__(
        self,
        model: GenRecForConditionalGeneration,
        trie: Trie,
        device: torch.device | str = "cpu",
        *,
        texts: ItemTexts | None = None,
        static: bool | None = None,
    ):
        """`texts` reads what mode `free` generates. `static`: shapes that depend on sizes alone and no wait for the device
        between the encoder and the lists; None: on a GPU."""
        self.trie = trie
        self.device = torch.device(device)
        self.texts = texts
        self.static = self.device.type == "cuda" if static is None else static
        self.levels = _Levels(trie, self.device)
        self.end_item = torch.from_numpy(trie.end_item.astype(np.int64)).to(self.device)
        self._program = _walk
        self._prepare(model)

    def of(self, model: GenRecForConditionalGeneration) -> TrieSearcher:
        """The same trie, decoded with another model of the same words."""
        other = copy.copy(self)
        other._prepare(model)
        return other

    def compiled(self, **options: object) -> TrieSearcher:
        """The same searcher with static shapes, its search one `torch.compile`d graph for each shape of batch."""
        other = copy.copy(self)
        other.static = True
        other._program = torch.compile(_walk, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]
        return other

    @torch.inference_mode()
    def search(
        self,
        encoder: EncoderInput,
        *,
        beam: int,
        top: int,
        mode: Mode = "exact",
        excluded: tuple[np.ndarray, np.ndarray] | None = None,
        ends: Ends = "kept",
    ) -> TopItems:
        """The best `top` items a user by log-probability under the mode's softmax.

        `excluded`: (user index in the batch, item row) pairs that must not be listed; in mode `free` they are struck out of
        the finished lists, elsewhere their places go to others. A beam narrower than `top` is widened to it. Equal scores go
        to the smaller node: the item of fewer sub-words, then the smaller token ids.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"decode mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if mode == "free":
            from genrec_dist.free_beam import search_freely

            return search_freely(self, encoder, beam=max(beam, top), top=top, excluded=excluded)
        if mode == "all":
            from genrec_dist.score_all import search_all

            return search_all(self, encoder, top=top, excluded=excluded)
        num_users = len(encoder.input_ids)
        lost = self._lost(excluded)
        if self.static:
            encoder = _in_static_shape(encoder)
        memory_BLD = self.model.encode(encoder) if self.static else encode_by_length(self.model, encoder)
        scores_BN, nodes_BN = self._program(
            self.model,
            self.levels,
            self.heads,
            self.softmaxes[mode],
            memory_BLD,
            encoder.attention_mask,
            lost,
            max(beam, top),
            top,
            ends,
            self.static,
        )
        scores_BN, nodes_BN = scores_BN[:num_users], nodes_BN[:num_users]
        return as_lists(scores_BN, self.end_item[nodes_BN], top)

    def _prepare(self, model: GenRecForConditionalGeneration) -> None:
        self.model = model
        weight_VD, eos = model.lm_head.weight.detach(), model.config.eos_token_id
        self.heads = [weight_VD[F.pad(tokens, (1, 0), value=eos)] for tokens in self.levels.tokens]
        used = torch.cat([torch.tensor([eos], device=self.device), *self.levels.tokens]).unique()
        self.softmaxes = {
            "exact": Softmax(weight_VD, eos),
            "compact": Softmax(weight_VD[used], int(torch.searchsorted(used, eos))),
        }

    def _lost(self, excluded: tuple[np.ndarray, np.ndarray] | None) -> _Lost | None:
        if excluded is None:
            return None
        return _lost(self.trie, pruned(self.trie, *excluded), self.device, padded=self.static)


class _Levels:
    """The trie as a search reads it, level by level, on its device."""

    def __init__(self, trie: Trie, device: torch.device):
        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.depth = trie.depth
        self.token = move(trie.token.astype(np.int64).clip(min=0))
        self.first_child = move(trie.first_child)
        self.num_children = move(trie.num_children)
        self.ends_here = move(trie.end_item >= 0)
        self.fans = [trie.widest_fan(level) for level in range(trie.depth + 1)]
        self.num_nodes = np.diff(trie.level_offsets).tolist()
        self.first_nodes = trie.level_offsets[:-1].tolist()
        self.tokens: list[Tensor] = []
        """int64 [V_l], distinct tokens below the nodes of each level, ascending."""
        column = np.zeros(trie.num_nodes, np.int64)
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
class _Lost:
    """What exclusion takes, by level, on the searcher's device."""

    ends: list[tuple[Tensor, Tensor]]
    """(users, nodes) int64 [X] where the item of a node with children is excluded."""
    dead: list[tuple[Tensor, Tensor, Tensor]]
    """(users, parents, places among the parent's children) int64 [X] of the nodes below which nothing is left."""


def _lost(trie: Trie, pairs: Pruned, device: torch.device, padded: bool) -> _Lost:
    def at_level(users: np.ndarray, nodes: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        here = (nodes >= first) & (nodes < last)
        return users[here], nodes[here]

    def move(*columns: np.ndarray) -> tuple[Tensor, ...]:
        # A pair of padding names a parent that is nowhere.
        size = 1 << max(len(columns[0]) - 1, 0).bit_length() if padded else len(columns[0])
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
    return _Lost(ends, dead)  # type: ignore[arg-type]


def _walk(
    model: GenRecForConditionalGeneration,
    levels: _Levels,
    heads: list[Tensor],
    softmax: Softmax,
    memory_BLD: Tensor,
    mask_BL: Tensor,
    lost: _Lost | None,
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
    scores_BK = _prefix_score(states_BPD[:, :-1], levels, heads, softmax)
    nodes_BK = torch.full((num_users, 1), levels.num_forced, dtype=torch.long, device=device)
    found_scores_BN, found_nodes_BN = scores_BK[:, :0], nodes_BK[:, :0]
    for level in range(levels.num_forced, levels.depth + 1):
        logprobs_BKV = log_probabilities(hidden_BKD, heads[level], softmax)
        reached_BKV = logprobs_BKV.add_(scores_BK[..., None])
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
            num_open = _num_open(scores_BK, found_scores_BN, top)
            if num_open == 0:
                break
            scores_BK, nodes_BK, parent_BK = scores_BK[:, :num_open], nodes_BK[:, :num_open], parent_BK[:, :num_open]
        if level > levels.num_forced:
            state.follow(parent_BK)
        hidden_BKD = state.step(levels.token[nodes_BK])
    return found_scores_BN, found_nodes_BN


def _prefix_score(states_BPD: Tensor, levels: _Levels, heads: list[Tensor], softmax: Softmax) -> Tensor:
    """Log-probability [B, 1] of the tokens that all items begin with."""
    total_B1 = states_BPD.new_zeros(len(states_BPD), 1, dtype=heads[0].dtype)
    for level in range(levels.num_forced):
        total_B1 += log_probabilities(states_BPD[:, level : level + 1], heads[level], softmax)[..., 1]
    return total_B1


def log_probabilities(hidden_BKD: Tensor, head_VD: Tensor, softmax: Softmax) -> Tensor:
    """[B, K, V_l] of `</s>` and the tokens of a level. Under autocast the head alone stays exact: rounded logits would tie by
    the hundred."""
    with torch.autocast(hidden_BKD.device.type, enabled=False):
        hidden_BKD = hidden_BKD.to(head_VD.dtype)
        logits_BKV = hidden_BKD @ head_VD.T
        return logits_BKV.sub_(softmax.log_normaliser(hidden_BKD, logits_BKV[..., 0])[..., None])


def _ended(ends_BK: Tensor, nodes_BK: Tensor, levels: _Levels, lost: _Lost | None, level: int, static: bool) -> Tensor:
    """-inf where no item ends at a beam's node, or an excluded one."""
    ends_BK = ends_BK.masked_fill(~levels.ends_here[nodes_BK], NOTHING)
    if lost is None:
        return ends_BK
    users_X, nodes_X = lost.ends[level]
    match_XK = nodes_BK[users_X] == nodes_X[:, None]
    return _without(ends_BK[..., None], users_X, match_XK, torch.zeros_like(users_X), static)[..., 0]


def _children(
    scores_BKV: Tensor,
    nodes_BK: Tensor,
    levels: _Levels,
    lost: _Lost | None,
    level: int,
    static: bool,
) -> tuple[Tensor, Tensor]:
    """(scores, nodes) of the children of all beams, [B, K * C]; `scores_BKV` are used up.

    A place without a child stands at the root with a score of -inf, which no token can raise again.
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
        children_BKC = (levels.first_child[nodes_BK][..., None] + columns_C).where(exists_BKC, 0)
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


def as_lists(scores_BN: Tensor, items_BN: Tensor, top: int) -> TopItems:
    items_BN = items_BN.masked_fill(scores_BN == NOTHING, -1)
    missing = top - items_BN.shape[1]
    if missing > 0:
        items_BN = F.pad(items_BN, (0, missing), value=-1)
        scores_BN = F.pad(scores_BN, (0, missing), value=NOTHING)
    return TopItems(items_BN.cpu().numpy().astype(np.int32), scores_BN.float().cpu().numpy())


def encode_by_length(model: GenRecForConditionalGeneration, encoder: EncoderInput) -> Tensor:
    """Encoder states [B, L, D], rows of like length encoded together: a short history does not pay for a long one."""
    lengths_B = encoder.attention_mask.sum(1)
    order = lengths_B.argsort(stable=True)
    if len(order) <= USERS_ENCODED_AT_ONCE or int(lengths_B.min()) == encoder.input_ids.shape[1]:
        return model.encode(encoder)
    memory_BLD = None
    for rows in _groups(order, lengths_B[order].tolist()):
        width = int(lengths_B[rows[-1]])
        part = EncoderInput(*(getattr(encoder, name)[rows, :width] for name in EncoderInput.__dataclass_fields__))
        states_BLD = model.encode(part)
        if memory_BLD is None:
            memory_BLD = states_BLD.new_zeros(*encoder.input_ids.shape, states_BLD.shape[-1])
        memory_BLD[rows, :width] = states_BLD
    assert memory_BLD is not None
    return memory_BLD


def _groups(order_B: Tensor, lengths: list[int]) -> list[Tensor]:
    """Rows by ascending length, cut where the longest of a group is a quarter longer than its shortest."""
    groups, start = [], 0
    for place, length in enumerate(lengths):
        if place - start >= USERS_ENCODED_AT_ONCE and length > 1.25 * lengths[start]:
            groups.append(order_B[start:place])
            start = place
    return [*groups, order_B[start:]]


def _in_static_shape(encoder: EncoderInput) -> EncoderInput:
    """Padded to a power of two of users, the last one repeated, and a multiple of 32 tokens: few shapes, each captured once."""
    num_users, num_tokens = encoder.input_ids.shape
    more_users = (1 << (num_users - 1).bit_length()) - num_users
    more_tokens = -num_tokens % 32

    def padded(rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, more_tokens))
        return torch.cat([rows, rows[-1:].expand(more_users, -1)]) if more_users else rows

    return replace(encoder, **{name: padded(getattr(encoder, name)) for name in EncoderInput.__dataclass_fields__})


def _num_open(scores_BK: Tensor, found_scores_BN: Tensor, top: int) -> int:
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
