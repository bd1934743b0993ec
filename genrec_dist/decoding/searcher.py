"""Top items of users: the modes of decoding, and what a batch goes through."""

# B users, K beams, P excluded pairs, L input tokens, D width, C candidates, N list or items

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.word_table import ItemTexts
from genrec_dist.decoding.beam_search import (
    NEG_INF,
    BeamOptions,
    Ends,
    best_of,
    search_trie,
)
from genrec_dist.decoding.decoder_state import Searchable
from genrec_dist.decoding.exhaustive import score_all
from genrec_dist.decoding.levels import Levels, exclude_by_level
from genrec_dist.decoding.output_head import SiblingHead, make_heads, siblings_of
from genrec_dist.decoding.rescoring import (
    Candidates,
    HistoryProbabilities,
    add_best,
    item_log_probabilities,
    score_candidates,
)
from genrec_dist.decoding.trie import Trie, forced_nodes, nodes_in_whole, prune_items, restrict
from genrec_dist.decoding.unconstrained import generate_freely
from genrec_dist.evaluation.metrics import EMPTY
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.model.network import BartNetwork, Network

Mode = Literal["exact", "compact", "free", "all", "items", "hybrid"]
"""exact: the trie's items by log-probability under the model's whole softmax. compact: the softmax
over the trie's tokens and `</s>` alone, another and cheaper normaliser. free: no trie, as the paper
decodes; what is generated may be no item. all: every item scored, the oracle of `exact`. items: by
the item head alone. hybrid: by log p of the decoder, of the item head and of the transition graph,
weighted as `Mixture` says, over the best of each."""

USERS_ENCODED_AT_ONCE, LENGTHS_ENCODED_AT_ONCE = 4, 1.5
"""An encoder pass on a CPU takes at least so many users, and more while the longest has at most so
many times the tokens of the shortest (docs/log.md, 2026-11-21)."""

MEMORY_AT_ONCE = 2**27
"""Most numbers that the keys and values of prompts take at one time."""

Pairs = tuple[np.ndarray, np.ndarray]
"""(user index in the batch, item row) [P] of items that must not be listed."""


@dataclass(frozen=True)
class TopItems:
    items: np.ndarray
    """int32 [B, N] item rows, best first; -1 after the end of a short list, -2 for a text (mode
    `free`) that is no item."""
    scores: np.ndarray
    """float32 [B, N] log-probabilities of the items' token strings, `</s>` included."""


class TrieSearcher:
    """A trie on a device, ready to decode batches of users with one model.

    The head's rows are gathered when the searcher is made: after a change of the weights make
    another with `of`.
    """

    def __init__(
        self,
        model: Searchable,
        trie: Trie,
        device: torch.device | str = "cpu",
        *,
        texts: ItemTexts | None = None,
        static: bool | None = None,
    ):
        """Move the trie to the device and gather the head's rows.

        Args:
            model: Whose lists are made.
            trie: The items that may be listed.
            device: The model's.
            texts: Reads what mode `free` generates.
            static: Shapes that depend on sizes alone and no wait for the device between the encoder
                and the lists; None: on a GPU.

        Raises:
            ValueError: A static search with weights other than float32.
        """
        self.device = torch.device(device)
        self.texts = texts
        # The searches of other models have shapes of their own.
        on_gpu = self.device.type == "cuda" and isinstance(model, BartNetwork)
        self.static = on_gpu if static is None else static
        self._search_trie = search_trie
        given = model.config.certain_tokens == "given"
        self.siblings = None
        if model.config.softmax == "siblings":
            self.siblings = siblings_of(trie).to(self.device)
        self.whole, nodes = trie, np.arange(trie.num_nodes)
        self._set_trie(trie, forced_nodes(trie) if given else None, nodes)
        self._set_model(model)

    def of(self, model: Searchable) -> TrieSearcher:
        """The same trie, decoded with another model of the same words."""
        other = copy.copy(self)
        other._set_model(model)
        return other

    def among(self, item_rows: np.ndarray) -> TrieSearcher:
        """The search among these items alone.

        An item's score is the same whatever else may be listed: forced tokens and siblings are
        those of the whole catalogue, `compact` stays a softmax over the whole catalogue's tokens,
        and `free`, which has no trie, stays what it is. Raises ValueError where no item is left or
        a row is no item's.
        """
        other = copy.copy(self)
        part = restrict(self.trie, item_rows)
        forced, nodes = self.forced, nodes_in_whole(self.trie, part)
        forced = None if forced is None else forced[nodes]
        other._set_trie(part, forced, self.whole_nodes[nodes])
        other._set_model(self.model)
        other.heads = {
            mode: replace(heads, softmax=self.heads[mode].softmax)
            for mode, heads in other.heads.items()
        }
        return other

    def compiled(self, **options: object) -> TrieSearcher:
        """The same searcher with static shapes, its search one `torch.compile`d graph for each
        shape of batch."""
        other = copy.copy(self)
        other.static = True
        other._search_trie = torch.compile(search_trie, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]
        return other

    def _set_trie(self, trie: Trie, forced: np.ndarray | None, whole_nodes: np.ndarray) -> None:
        self.trie, self.forced, self.whole_nodes = trie, forced, whole_nodes
        siblings = None if self.siblings is None else (self.whole, whole_nodes)
        self.levels = Levels(trie, self.device, forced, siblings)
        self.item_node = torch.from_numpy(trie.item_node).to(self.device)
        self.__dict__.pop("paths", None)

    def _set_model(self, model: Searchable) -> None:
        self.model = model
        weight_VD, eos = model.head_weight.detach(), model.config.eos_token_id
        if self.static and model.lm_head.weight.dtype != torch.float32:
            raise ValueError(
                "a search in static shapes scores in float32, "
                f"the model's weights are {model.lm_head.weight.dtype}"
            )
        exact, compact = make_heads(weight_VD, eos, self.levels.tokens)
        if self.siblings is not None:
            assert isinstance(model, Network)
            head = SiblingHead(self.siblings, model.output_rows().detached())
            exact = compact = replace(exact, siblings=head)
        self.heads = {"exact": exact, "compact": compact}

    @cached_property
    def paths(self) -> Tensor:
        """int64 [N, T], the nodes of each item from below the root on, the sentinel after its last
        one."""
        paths_NT = self.trie.item_paths()
        paths_NT[paths_NT < 0] = self.levels.sentinel
        return torch.from_numpy(paths_NT).to(self.device)

    @torch.inference_mode()
    def search(
        self,
        encoder: EncoderInput,
        *,
        beam: int,
        top: int,
        mode: Mode = "exact",
        excluded: Pairs | None = None,
        ends: Ends = "kept",
        mixture: Mixture | None = None,
        known: HistoryProbabilities | None = None,
    ) -> TopItems:
        """The best items of each user by log-probability under the mode's softmax.

        Equal scores go to the smaller node: the item of fewer sub-words, then the smaller token
        ids.

        Args:
            encoder: The users' histories, on the searcher's device.
            beam: Width of the beam; one narrower than `top` is widened to it.
            top: Length of the lists.
            mode: How items are scored.
            excluded: Items that must not be listed; in mode `free` they are taken out of the
                finished lists, elsewhere their places go to others.
            ends: Of modes `exact` and `compact`.
            mixture: Of `hybrid`; None: its defaults.
            known: What `hybrid` knows from the histories alone.

        Raises:
            ValueError: An unknown mode; `free` where the searcher cannot read texts or the model
                has forced tokens; `items` where the model has no item head.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"decode mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        beam, known = max(beam, top), known or HistoryProbabilities()
        most = self._users_at_once(encoder)
        if len(encoder.input_ids) > most:
            parts = [
                self.search(
                    part.encoder,
                    beam=beam,
                    top=top,
                    mode=mode,
                    excluded=part.excluded,
                    ends=ends,
                    mixture=mixture,
                    known=known.map(lambda prob_BN, at=part.users: prob_BN[at]),  # type: ignore[misc]
                )
                for part in _parts(encoder, excluded, most)
            ]
            items_BN, scores_BN = zip(*((part.items, part.scores) for part in parts), strict=True)
            return TopItems(np.concatenate(items_BN), np.concatenate(scores_BN))
        if mode == "hybrid":
            found = self.candidates(encoder, beam=beam, excluded=excluded, known=known)
            return self._rank(found.mix_scores(mixture or Mixture()), found.items_BC, top)
        if mode in ("exact", "compact"):
            num_users = len(encoder.input_ids)
            if self.static:
                encoder = in_static_shape(encoder)
            memory_BLD = (
                self.model.encode(encoder) if self.static else encode_by_length(self.model, encoder)
            )
            options = BeamOptions(beam=beam, top=top, ends=ends, static=self.static)
            scores_BN, items_BN = self._search_beam(memory_BLD, encoder, mode, excluded, options)
            return _as_lists(scores_BN[:num_users], items_BN[:num_users], top)
        if mode == "free":
            return self._search_freely(encoder, beam, top, excluded)
        memory_BLD, mask_BL = encode_by_length(self.model, encoder), encoder.attention_mask
        if mode == "items":
            scores_BN = item_log_probabilities(self.model, memory_BLD, mask_BL)
        else:
            heads = self.heads["exact"]
            scores_BN = score_all(self.model, self.trie, self.levels, heads, memory_BLD, mask_BL)
        rows_BN = torch.arange(scores_BN.shape[1], device=self.device).expand(scores_BN.shape)
        excluded_BN = self._excluded_items(len(memory_BLD), excluded)
        return self._rank(scores_BN.masked_fill(excluded_BN, NEG_INF), rows_BN, top)

    @torch.inference_mode()
    def candidates(
        self,
        encoder: EncoderInput,
        *,
        beam: int,
        excluded: Pairs | None = None,
        known: HistoryProbabilities,
    ) -> Candidates:
        """What `hybrid` ranks: the best `beam` items of the decoder, of the item head, of the
        graph, of the history and of the texts, as far as there are any, and none that is excluded.

        Args:
            encoder: The users' histories.
            beam: Width of the beam, and how many items each part suggests.
            excluded: Items that must not be listed.
            known: Of all items, from the histories alone.
        """
        memory_BLD, mask_BL = encode_by_length(self.model, encoder), encoder.attention_mask
        excluded_BN = self._excluded_items(len(memory_BLD), excluded)
        item_logp_BN = None
        if self.model.config.item_loss:
            item_logp_BN = item_log_probabilities(self.model, memory_BLD, mask_BL)
            item_logp_BN = item_logp_BN.masked_fill(excluded_BN, NEG_INF)
        options = BeamOptions(beam=beam, top=beam)
        scores_BN, items_BC = self._search_beam(memory_BLD, encoder, "exact", excluded, options)
        items_BC = items_BC.masked_fill(scores_BN == NEG_INF, EMPTY)
        if item_logp_BN is not None:
            items_BC = add_best(items_BC, item_logp_BN, beam)
        known = known.map(lambda prob_BN: prob_BN.to(self.device, scores_BN.dtype))
        # All items that are not in the history have the same, the least, probability.
        new_B1 = 0.0 if known.repeat is None else known.repeat.amin(1, keepdim=True)
        for prob_BN, least in ((known.graph, 0.0), (known.repeat, new_B1), (known.text, 0.0)):
            if prob_BN is not None:
                left_BN = prob_BN.masked_fill(excluded_BN | (prob_BN <= least), NEG_INF)
                items_BC = add_best(items_BC, left_BN, beam)
        paths_BCT = torch.where(
            items_BC[..., None] >= 0, self.paths[items_BC], self.levels.sentinel
        )
        decoder_logp_BC = score_candidates(
            self.model, self.levels, self.heads["exact"], memory_BLD, mask_BL, paths_BCT
        )
        rows_BC = items_BC.clamp(min=0)
        return Candidates(
            items_BC=items_BC,
            decoder_logp_BC=decoder_logp_BC,
            item_logp_BC=None if item_logp_BN is None else item_logp_BN.gather(1, rows_BC),
            known=known.map(lambda prob_BN: prob_BN.gather(1, rows_BC)),
            num_items=excluded_BN.shape[1],
        )

    def _users_at_once(self, encoder: EncoderInput) -> int:
        """Most users of a batch that are searched together."""
        if isinstance(self.model, Network):
            return len(encoder.input_ids)
        per_user = encoder.input_ids.shape[1] * self.model.config.memory_width
        return max(1, MEMORY_AT_ONCE // per_user)

    def _search_beam(
        self,
        memory_BLD: Tensor,
        encoder: EncoderInput,
        mode: str,
        excluded: Pairs | None,
        options: BeamOptions,
    ) -> tuple[Tensor, Tensor]:
        """(scores, item rows) [B, N] of the beam."""
        by_level = None
        if excluded is not None:
            pairs = prune_items(self.trie, *excluded)
            by_level = exclude_by_level(self.trie, pairs, self.device, padded=options.static)
        mask_BL, heads = encoder.attention_mask, self.heads[mode]
        scores_BN, nodes_BN = self._search_trie(
            self.model, self.levels, heads, memory_BLD, mask_BL, by_level, options
        )
        return scores_BN, self.levels.end_item[nodes_BN]

    def _rank(self, scores_BC: Tensor, items_BC: Tensor, top: int) -> TopItems:
        """The best of these items; ties go by the node at which an item ends, as in the beam."""
        best_BN, _, places_BN = best_of(
            scores_BC, lambda places: self.item_node[items_BC.gather(1, places)], top
        )
        return _as_lists(best_BN, items_BC.gather(1, places_BN), top)

    def _excluded_items(self, num_users: int, excluded: Pairs | None) -> Tensor:
        """bool [B, N]: items that must not be listed, and those that are not in the trie."""
        excluded_BN = (self.item_node < 0).repeat(num_users, 1)
        if excluded is not None:
            columns = (torch.from_numpy(np.asarray(column, np.int64)) for column in excluded)
            users, items = (column.to(self.device) for column in columns)
            excluded_BN[users, items] = True
        return excluded_BN

    def _search_freely(
        self, encoder: EncoderInput, beam: int, top: int, excluded: Pairs | None
    ) -> TopItems:
        """A text that is no item keeps its place as -2, and an item that two token strings spell
        is listed twice: the rates of both are what this mode is for. Strings longer than the
        longest item have no `</s>` in time and are not listed."""
        if self.texts is None:
            raise ValueError(
                "decode mode free needs the run's tokenizer: load the run with load_run"
            )
        if self.forced is not None:
            raise ValueError(
                "decode mode free: this model never learned the tokens that only a trie makes "
                "certain: train with tokens.forced learned, or decode in another mode"
            )
        memory_BLD, mask_BL = encode_by_length(self.model, encoder), encoder.attention_mask
        scores_BN, strings_BNT, lengths_BN = generate_freely(
            self.model, memory_BLD, mask_BL, longest=self.levels.depth, beam=beam, top=top
        )
        items_BN = np.full(scores_BN.shape, EMPTY, np.int32)
        listed = scores_BN > NEG_INF
        pairs = zip(strings_BNT[listed], lengths_BN[listed], strict=True)
        items_BN[listed] = self.texts.rows([tokens[:length] for tokens, length in pairs])
        if excluded is None:
            return TopItems(items_BN, scores_BN)
        # Lists close up where an excluded item was.
        users, items = (np.asarray(column, np.int64) for column in excluded)
        base = max(int(items.max(initial=0)), int(items_BN.max(initial=0))) + 1
        keys_BN = np.arange(len(items_BN))[:, None] * base + items_BN
        struck_BN = np.isin(keys_BN, users * base + items) & (items_BN >= 0)
        order_BN = np.argsort(struck_BN, axis=1, kind="stable")
        items_BN = np.where(struck_BN, EMPTY, items_BN)
        scores_BN = np.where(struck_BN, np.float32(NEG_INF), scores_BN)
        return TopItems(
            np.take_along_axis(items_BN, order_BN, 1), np.take_along_axis(scores_BN, order_BN, 1)
        )


class _Part(NamedTuple):
    """Some users of a batch."""

    users: slice
    encoder: EncoderInput
    excluded: Pairs | None


def _parts(encoder: EncoderInput, excluded: Pairs | None, most: int) -> Iterator[_Part]:
    """A batch in parts of at most so many users."""
    for first in range(0, len(encoder.input_ids), most):
        users, pairs = slice(first, first + most), None
        if excluded is not None:
            rows, items = (np.asarray(column) for column in excluded)
            mine = (rows >= first) & (rows < first + most)
            pairs = rows[mine] - first, items[mine]
        yield _Part(users, encoder.map(lambda values, at=users: values[at]), pairs)  # type: ignore[misc]


def _as_lists(scores_BN: Tensor, items_BN: Tensor, top: int) -> TopItems:
    items_BN = items_BN.masked_fill(scores_BN == NEG_INF, EMPTY)
    missing = top - items_BN.shape[1]
    if missing > 0:
        items_BN = F.pad(items_BN, (0, missing), value=EMPTY)
        scores_BN = F.pad(scores_BN, (0, missing), value=NEG_INF)
    return TopItems(items_BN.cpu().numpy().astype(np.int32), scores_BN.float().cpu().numpy())


def encode_by_length(model: Searchable, encoder: EncoderInput) -> Tensor:
    """Encoder states [B, L, D], rows of like length encoded together: a short history does not pay
    for a long one."""
    lengths_B = encoder.attention_mask.sum(1)
    order = lengths_B.argsort(stable=True)
    lengths = lengths_B[order].tolist()
    if len(order) <= USERS_ENCODED_AT_ONCE or lengths[0] == encoder.input_ids.shape[1]:
        return model.encode(encoder)
    memory_BLD, first = None, 0
    for end in range(1, len(order) + 1):
        # A group ends where the next row is too long for it and it is large enough.
        small = end - first < USERS_ENCODED_AT_ONCE
        if end < len(order) and (small or lengths[end] <= LENGTHS_ENCODED_AT_ONCE * lengths[first]):
            continue
        rows, width = order[first:end], slice(lengths[end - 1])
        states_BLD = model.encode(encoder.map(lambda values, at=(rows, width): values[at]))  # type: ignore[misc]
        if memory_BLD is None:
            memory_BLD = states_BLD.new_zeros(*encoder.input_ids.shape, states_BLD.shape[-1])
        memory_BLD[rows, width] = states_BLD
        first = end
    assert memory_BLD is not None
    return memory_BLD


def in_static_shape(encoder: EncoderInput) -> EncoderInput:
    """Padded to a power of two of users, the last one repeated, and a multiple of 32 tokens: few
    shapes, each captured once."""
    num_users, num_tokens = encoder.input_ids.shape
    more_users = (1 << (num_users - 1).bit_length()) - num_users
    more_tokens = -num_tokens % 32

    def pad(rows: Tensor) -> Tensor:
        # Of [B, L] the last dimension are tokens, of [B, L, S] the one before.
        rows = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, more_tokens))
        last = rows[-1:].expand(more_users, *rows.shape[1:])
        return torch.cat([rows, last]) if more_users else rows

    return encoder.map(pad)
