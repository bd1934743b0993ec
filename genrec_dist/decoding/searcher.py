"""Top items of users by beam search: the modes, and what a batch goes through."""

# B users, K beams, P excluded pairs, L input tokens, D width, N list

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.word_table import ItemTexts
from genrec_dist.decoding.beam_search import NEG_INF, Ends, Levels, best_of, exclude_by_level, walk
from genrec_dist.decoding.exhaustive import score_all
from genrec_dist.decoding.output_head import make_heads
from genrec_dist.decoding.rescoring import (
    Candidates,
    item_log_probabilities,
    score_candidates,
    with_best,
)
from genrec_dist.decoding.trie import Trie, nodes_in, one_way, prune_items, restrict
from genrec_dist.decoding.unconstrained import generate_freely
from genrec_dist.evaluation.metrics import EMPTY
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.model.genrec import GenRecForConditionalGeneration

Mode = Literal["exact", "compact", "free", "all", "items", "hybrid"]
"""exact: the trie's items by log-probability under the model's whole softmax. compact: the softmax
over the trie's tokens and `</s>` alone, another and cheaper normaliser. free: no trie, as the paper
decodes; what is generated may be no item. all: every item scored, the oracle of `exact`. items: by
the item head alone. hybrid: by log p of the decoder, of the item head and of the transition graph,
weighted as `Mixture` says, over the best of each."""
ITEM_HEAD_MODES = ("items", "hybrid")

USERS_ENCODED_AT_ONCE, LENGTHS_ENCODED_AT_ONCE = 4, 1.5
"""An encoder pass on a CPU takes at least so many users, and more while the longest has at most so
many times the tokens of the shortest (docs/log.md, 2026-11-21)."""


@dataclass(frozen=True)
class TopItems:
    items: np.ndarray
    """int32 [B, N] item rows, best first; -1 behind the end of a short list, -2 for a text (mode
    `free`) that is no item."""
    scores: np.ndarray
    """float32 [B, N] log-probabilities of the items' token strings, `</s>` included."""


class TrieSearcher:
    """A trie on a device, ready to decode batches of users with one model.

    The head's rows are gathered when the searcher is made: after a change of the weights make
    another with `of`."""

    def __init__(
        self,
        model: GenRecForConditionalGeneration,
        trie: Trie,
        device: torch.device | str = "cpu",
        *,
        texts: ItemTexts | None = None,
        static: bool | None = None,
    ):
        """`texts` reads what mode `free` generates. `static`: shapes that depend on sizes alone and
        no wait for the device between the encoder and the lists; None: on a GPU."""
        self.device = torch.device(device)
        self.texts = texts
        self.static = self.device.type == "cuda" if static is None else static
        self._walk = walk
        self._walk_on(trie, one_way(trie) if model.config.certain_tokens == "given" else None)
        self._take(model)

    def of(self, model: GenRecForConditionalGeneration) -> TrieSearcher:
        """The same trie, decoded with another model of the same words."""
        other = copy.copy(self)
        other._take(model)
        return other

    def among(self, item_rows: np.ndarray) -> TrieSearcher:
        """The search among these items alone. An item's score is the same whatever else may be
        listed: `compact` stays a softmax over the whole catalogue's tokens, and `free`, which walks
        no trie, stays what it is. Raises ValueError if no item is left or a row is no item's."""
        other = copy.copy(self)
        part = restrict(self.trie, item_rows)
        # What is certain is so in the whole catalogue.
        certain = self.certain
        other._walk_on(part, None if certain is None else certain[nodes_in(self.trie, part)])
        other._take(self.model)
        other.heads = {
            mode: replace(part, softmax=self.heads[mode].softmax)
            for mode, part in other.heads.items()
        }
        return other

    def compiled(self, **options: object) -> TrieSearcher:
        """The same searcher with static shapes, its walk one `torch.compile`d graph for each shape
        of batch."""
        other = copy.copy(self)
        other.static = True
        other._walk = torch.compile(walk, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]
        return other

    def _walk_on(self, trie: Trie, certain: np.ndarray | None) -> None:
        self.trie, self.certain = trie, certain
        self.levels = Levels(trie, self.device, certain)
        self.item_node = torch.from_numpy(trie.item_node).to(self.device)
        self.__dict__.pop("paths", None)

    def _take(self, model: GenRecForConditionalGeneration) -> None:
        self.model = model
        if self.static and model.lm_head.weight.dtype != torch.float32:
            raise ValueError(
                f"a search in static shapes scores in float32, the model's weights are {model.lm_head.weight.dtype}"
            )
        weight_VD, eos = model.head_weight.detach(), model.config.eos_token_id
        exact, compact = make_heads(weight_VD, eos, self.levels.tokens)
        self.heads = {"exact": exact, "compact": compact}

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
        mixture: Mixture | None = None,
        graph_prob_BN: Tensor | None = None,
    ) -> TopItems:
        """The best `top` items a user by log-probability under the mode's softmax.

        `excluded`: (user index in the batch, item row) pairs [P] that must not be listed; in mode
        `free` they are struck out of the finished lists, elsewhere their places go to others. A
        beam narrower than `top` is widened to it. Equal scores go to the smaller node: the item of
        fewer sub-words, then the smaller token ids. `mixture` (None: its defaults) and the graph's
        shares, float [B, N], belong to `hybrid`. Raises ValueError for an unknown mode, for `free`
        where the searcher cannot read texts, and where the model has no item head for `items`, and
        for `hybrid` without a graph."""
        beam = max(beam, top)
        if mode == "free":
            return self._search_freely(encoder, beam, top, excluded)
        if mode == "all":
            return self._search_all(encoder, top, excluded)
        if mode == "items":
            return self._search_items(encoder, top, excluded)
        if mode == "hybrid":
            found = self.candidates(
                encoder, beam=beam, excluded=excluded, graph_prob_BN=graph_prob_BN
            )
            return self._best_of(found, mixture or Mixture(), top)
        if mode not in self.heads:
            raise ValueError(f"decode mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        num_users = len(encoder.input_ids)
        excluded_levels = None
        if excluded is not None:
            excluded_levels = exclude_by_level(
                self.trie, prune_items(self.trie, *excluded), self.device, padded=self.static
            )
        if self.static:
            encoder = in_static_shape(encoder)
        memory_BLD = (
            self.model.encode(encoder) if self.static else encode_by_length(self.model, encoder)
        )
        scores_BN, nodes_BN = self._walk(
            self.model, self.levels, self.heads[mode], memory_BLD, encoder.attention_mask, excluded_levels,
            beam=beam, top=top, ends=ends, static=self.static,
        )  # fmt: skip
        return _as_lists(scores_BN[:num_users], self.levels.end_item[nodes_BN[:num_users]], top)

    @torch.inference_mode()
    def candidates(
        self,
        encoder: EncoderInput,
        *,
        beam: int,
        excluded: tuple[np.ndarray, np.ndarray] | None = None,
        graph_prob_BN: Tensor | None = None,
    ) -> Candidates:
        """What `hybrid` ranks: the best `beam` items of the decoder, of the item head and of the
        graph's shares, float [B, N]; of what there is, and none that is excluded. Raises ValueError
        where there is neither an item head nor a graph."""
        memory_BLD, mask_BL = encode_by_length(self.model, encoder), encoder.attention_mask
        excluded_BN = self._excluded_items(len(memory_BLD), excluded)
        item_logp_BN = None
        if self.model.config.item_loss or graph_prob_BN is None:
            item_logp_BN = item_log_probabilities(self.model, memory_BLD, mask_BL).masked_fill(
                excluded_BN, NEG_INF
            )
        excluded_levels = (
            None
            if excluded is None
            else exclude_by_level(
                self.trie, prune_items(self.trie, *excluded), self.device, padded=False
            )
        )
        scores_BN, nodes_BN = self._walk(
            self.model, self.levels, self.heads["exact"], memory_BLD, mask_BL, excluded_levels,
            beam=beam, top=beam, ends="kept", static=False,
        )  # fmt: skip
        items_BC = self.levels.end_item[nodes_BN].masked_fill(scores_BN == NEG_INF, EMPTY)
        if item_logp_BN is not None:
            items_BC = with_best(items_BC, item_logp_BN, beam)
        if graph_prob_BN is not None:
            graph_prob_BN = graph_prob_BN.to(self.device, scores_BN.dtype)
            items_BC = with_best(
                items_BC,
                graph_prob_BN.masked_fill(excluded_BN | (graph_prob_BN == 0), NEG_INF),
                beam,
            )
        paths_BCT = torch.where(
            items_BC[..., None] >= 0, self.paths[items_BC], self.levels.sentinel
        )
        decoder_logp_BC = score_candidates(
            self.model, self.levels, self.heads["exact"], memory_BLD, mask_BL, paths_BCT
        )
        item_logp_BC, graph_prob_BC = (
            None if values_BN is None else values_BN.gather(1, items_BC.clamp(min=0))
            for values_BN in (item_logp_BN, graph_prob_BN)
        )
        return Candidates(
            items_BC, decoder_logp_BC, item_logp_BC, graph_prob_BC, excluded_BN.shape[1]
        )

    def _best_of(self, found: Candidates, mixture: Mixture, top: int) -> TopItems:
        best_BN, _, places_BN = best_of(
            found.mixed(mixture),
            lambda places: self.item_node[found.items_BC.gather(1, places)],
            top,
        )
        return _as_lists(best_BN, found.items_BC.gather(1, places_BN), top)

    def _search_items(
        self, encoder: EncoderInput, top: int, excluded: tuple[np.ndarray, np.ndarray] | None
    ) -> TopItems:
        memory_BLD = encode_by_length(self.model, encoder)
        scores_BN = item_log_probabilities(self.model, memory_BLD, encoder.attention_mask)
        scores_BN = scores_BN.masked_fill(self._excluded_items(len(memory_BLD), excluded), NEG_INF)
        best_BN, _, rows_BN = best_of(scores_BN, lambda rows_BN: self.item_node[rows_BN], top)
        return _as_lists(best_BN, rows_BN, top)

    def _excluded_items(
        self, num_users: int, excluded: tuple[np.ndarray, np.ndarray] | None
    ) -> Tensor:
        """bool [B, N]: items that must not be listed, and those that are not in the trie."""
        excluded_BN = (self.item_node < 0).repeat(num_users, 1)
        if excluded is not None:
            users, items = (
                torch.from_numpy(np.asarray(column, np.int64)).to(self.device)
                for column in excluded
            )
            excluded_BN[users, items] = True
        return excluded_BN

    @cached_property
    def paths(self) -> Tensor:
        """int64 [N, T], the nodes of each item from below the root on, `sentinel` behind its
        last."""
        trie = self.trie
        node_N, level_N = (
            trie.item_node,
            np.searchsorted(trie.level_offsets, trie.item_node, side="right") - 1,
        )
        paths_NT = np.full((len(node_N), trie.depth), self.levels.sentinel, np.int64)
        for level in range(trie.depth, 0, -1):
            here = (node_N >= 0) & (level_N == level)
            paths_NT[here, level - 1] = node_N[here]
            node_N, level_N = np.where(here, trie.parent[node_N], node_N), level_N - here
        return torch.from_numpy(paths_NT).to(self.device)

    def _search_all(
        self, encoder: EncoderInput, top: int, excluded: tuple[np.ndarray, np.ndarray] | None
    ) -> TopItems:
        memory_BLD = encode_by_length(self.model, encoder)
        scores_BN = score_all(
            self.model,
            self.trie,
            self.levels,
            self.heads["exact"],
            memory_BLD,
            encoder.attention_mask,
        )
        if excluded is not None:
            users, items = (
                torch.from_numpy(np.asarray(column, np.int64)).to(self.device)
                for column in excluded
            )
            scores_BN[users, items] = NEG_INF
        # The tie rule goes by the node at which an item ends, as in the walk.
        best_BN, _, rows_BN = best_of(scores_BN, lambda rows_BN: self.item_node[rows_BN], top)
        return _as_lists(best_BN, rows_BN, top)

    def _search_freely(
        self,
        encoder: EncoderInput,
        beam: int,
        top: int,
        excluded: tuple[np.ndarray, np.ndarray] | None,
    ) -> TopItems:
        """A text that is no item's word keeps its place as -2; an item that two token strings spell
        stands twice: the rates of both are what this mode is asked for. Strings longer than the
        longest item have no `</s>` in time and are not listed."""
        if self.texts is None:
            raise ValueError(
                "decode mode free needs the run's tokenizer: load the run with load_run"
            )
        if self.certain is not None:
            raise ValueError(
                "decode mode free: this model never learned the tokens that only a trie makes certain: train with tokens.certain "
                "learned, or decode in another mode"
            )
        memory_BLD = encode_by_length(self.model, encoder)
        scores_BN, strings_BNT, lengths_BN = generate_freely(
            self.model,
            memory_BLD,
            encoder.attention_mask,
            longest=self.levels.depth,
            beam=beam,
            top=top,
        )
        items_BN = np.full(scores_BN.shape, EMPTY, np.int32)
        listed = scores_BN > NEG_INF
        strings = [
            tokens[:length]
            for tokens, length in zip(strings_BNT[listed], lengths_BN[listed], strict=True)
        ]
        items_BN[listed] = self.texts.rows(strings)
        return _without(items_BN, scores_BN, excluded)


def _as_lists(scores_BN: Tensor, items_BN: Tensor, top: int) -> TopItems:
    items_BN = items_BN.masked_fill(scores_BN == NEG_INF, EMPTY)
    missing = top - items_BN.shape[1]
    if missing > 0:
        items_BN = F.pad(items_BN, (0, missing), value=EMPTY)
        scores_BN = F.pad(scores_BN, (0, missing), value=NEG_INF)
    return TopItems(items_BN.cpu().numpy().astype(np.int32), scores_BN.float().cpu().numpy())


def _without(
    items_BN: np.ndarray, scores_BN: np.ndarray, excluded: tuple[np.ndarray, np.ndarray] | None
) -> TopItems:
    """Finished lists, closed up where an excluded item stood."""
    if excluded is None:
        return TopItems(items_BN, scores_BN)
    users, items = (np.asarray(column, np.int64) for column in excluded)
    span = max(int(items.max(initial=0)), int(items_BN.max(initial=0))) + 1
    keys_BN = np.arange(len(items_BN))[:, None] * span + items_BN
    struck_BN = np.isin(keys_BN, users * span + items) & (items_BN >= 0)
    order_BN = np.argsort(struck_BN, axis=1, kind="stable")
    return TopItems(
        np.take_along_axis(np.where(struck_BN, EMPTY, items_BN), order_BN, 1),
        np.take_along_axis(np.where(struck_BN, np.float32(NEG_INF), scores_BN), order_BN, 1),
    )


def _upper_left(rows: Tensor, width: int, values: Tensor) -> Tensor:
    return values[rows, :width]


def encode_by_length(model: GenRecForConditionalGeneration, encoder: EncoderInput) -> Tensor:
    """Encoder states [B, L, D], rows of like length encoded together: a short history does not pay
    for a long one."""
    lengths_B = encoder.attention_mask.sum(1)
    order = lengths_B.argsort(stable=True)
    if len(order) <= USERS_ENCODED_AT_ONCE or int(lengths_B.min()) == encoder.input_ids.shape[1]:
        return model.encode(encoder)
    memory_BLD = None
    for rows in _groups(order, lengths_B[order].tolist()):
        width = int(lengths_B[rows[-1]])
        group = encoder.map(partial(_upper_left, rows, width))
        states_BLD = model.encode(group)
        if memory_BLD is None:
            memory_BLD = states_BLD.new_zeros(*encoder.input_ids.shape, states_BLD.shape[-1])
        memory_BLD[rows, :width] = states_BLD
    assert memory_BLD is not None
    return memory_BLD


def _groups(order_B: Tensor, lengths: list[int]) -> list[Tensor]:
    """Rows by ascending length, cut where the next one is too long for a group that is large
    enough."""
    groups, start = [], 0
    for place, length in enumerate(lengths):
        if (
            place - start >= USERS_ENCODED_AT_ONCE
            and length > LENGTHS_ENCODED_AT_ONCE * lengths[start]
        ):
            groups.append(order_B[start:place])
            start = place
    return [*groups, order_B[start:]]


def in_static_shape(encoder: EncoderInput) -> EncoderInput:
    """Padded to a power of two of users, the last one repeated, and a multiple of 32 tokens: few
    shapes, each captured once."""
    num_users, num_tokens = encoder.input_ids.shape
    more_users = (1 << (num_users - 1).bit_length()) - num_users
    more_tokens = -num_tokens % 32

    def padded(rows: Tensor) -> Tensor:
        # Of [B, L] the last dimension are tokens, of [B, L, S] the one before.
        rows = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, more_tokens))
        return (
            torch.cat([rows, rows[-1:].expand(more_users, *rows.shape[1:])]) if more_users else rows
        )

    return encoder.map(padded)
