"""What the encoder reads: sentences of words, one behind another or side by side, with positions
and ids."""

# B samples, L input tokens, n tokens of all sentences, W words, S further sub-words

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from genrec_shards.sequences import flat_ranges
from torch import Tensor

from genrec_dist.config.recipe import EncoderUnit
from genrec_dist.data.packing import filled_size
from genrec_dist.data.word_table import BOS_WORD, EOS_WORD, FIRST_MASK_WORD, WordTable


@dataclass(frozen=True)
class ForcedTokens:
    """What of the items' words the trie alone decides (`trie.forced_tokens`)."""

    tokens: np.ndarray
    """bool [total], as `WordTable.tokens`."""
    ends: np.ndarray
    """bool [W], whether nothing but </s> can follow a word."""


@dataclass(frozen=True)
class Layout:
    """What the encoder's input looks like; the same for training, evaluation and single
    requests."""

    words: WordTable
    pad_token: int
    max_tokens: int
    """Most encoder positions."""
    user_ids: bool
    positions: Literal["from-start", "from-end"]
    unit: EncoderUnit = "subword"
    causal: bool = False
    """Nothing stands behind a history: no [MASK], no </s>."""
    forced: ForcedTokens | None = None
    """What of the targets is not learned, because the trie decides it; None: all is."""

    def __post_init__(self) -> None:
        if self.sure_items < 1:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the longest user and item, {self._longest_user} and "
                f"{self._longest_item} positions, between <s> and </s>: raise it, train a larger vocabulary or let an item be one "
                "position (model.encoder_unit)"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [W], encoder positions of each word."""
        return self.words.lengths if self.unit == "subword" else np.ones_like(self.words.lengths)

    @property
    def num_further(self) -> int:
        """Sub-words behind the first that a position may have."""
        if self.unit == "subword":
            return 0
        return max(self.words.longest_item, self.words.longest_user if self.user_ids else 0) - 1

    @property
    def sure_items(self) -> int:
        """Items that fit whatever their length; pretraining targets are drawn among these most
        recent ones."""
        return (self.max_tokens - 2 - self._longest_user) // self._longest_item

    @property
    def _longest_item(self) -> int:
        return self.words.longest_item if self.unit == "subword" else 1

    @property
    def _longest_user(self) -> int:
        if not self.user_ids:
            return 0
        return self.words.longest_user if self.unit == "subword" else 1


@dataclass(frozen=True)
class EncoderInput:
    """Sentences side by side, padded to the longest; or, where a `Packing` says where each lies,
    one behind another: [n]."""

    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor
    """bool [B, L], False on padding; [n] and True where packed."""
    position_ids: Tensor
    """int64 [B, L]."""
    user_rows: Tensor
    """int64 [B, L], row + 1 on the user's tokens, else 0."""
    item_rows: Tensor
    """int64 [B, L], row + 1 on an item's tokens, else 0."""
    further_ids: Tensor | None = None
    """int64 [B, L, S], where a position is a word: its sub-words behind the first, <pad> where it
    has fewer."""

    def map(self, change: Callable[[Tensor], Tensor]) -> EncoderInput:
        """With each array changed."""
        return EncoderInput(
            *(None if values is None else change(values) for values in vars(self).values())
        )

    def to(self, device: torch.device) -> EncoderInput:
        return self.map(partial(Tensor.to, device=device, non_blocking=True))


@dataclass(frozen=True)
class Text:
    """Encoder sentences one behind another."""

    tokens_n: np.ndarray
    """int64 [n], as are the next three."""
    positions_n: np.ndarray
    users_n: np.ndarray
    items_n: np.ndarray
    lengths_B: np.ndarray
    """int64 [B], tokens a sentence."""
    masks: np.ndarray
    """int64, tokens that are masks, in their order."""
    further_nS: np.ndarray | None = None
    """int64 [n, S], as `EncoderInput.further_ids`."""

    @property
    def longest(self) -> int:
        return int(self.lengths_B.max(initial=0))

    def with_padding_sequence(self, pad_token: int) -> Text:
        """With a last sentence of padding, at least one token, so that few numbers of tokens
        occur."""
        missing = filled_size(len(self.tokens_n) + 1) - len(self.tokens_n)
        zeros = np.zeros(missing, np.int64)
        further_nS = self.further_nS
        if further_nS is not None:
            further_nS = np.pad(further_nS, ((0, missing), (0, 0)), constant_values=pad_token)
        return Text(
            tokens_n=np.append(self.tokens_n, zeros + pad_token),
            positions_n=np.append(self.positions_n, zeros),
            users_n=np.append(self.users_n, zeros),
            items_n=np.append(self.items_n, zeros),
            lengths_B=np.append(self.lengths_B, missing),
            masks=self.masks,
            further_nS=further_nS,
        )

    @property
    def padded_masks(self) -> np.ndarray:
        """int64, where the masks lie among the tokens of the padded arrays, [B x L]."""
        ends_B = np.cumsum(self.lengths_B)
        sentences = np.searchsorted(ends_B, self.masks, side="right")
        return sentences * self.longest + self.masks - (ends_B - self.lengths_B)[sentences]

    def packed(self) -> EncoderInput:
        tokens, positions, users, items = map(
            torch.from_numpy, (self.tokens_n, self.positions_n, self.users_n, self.items_n)
        )
        mask_n = torch.ones(1, dtype=torch.bool).expand(len(tokens))
        further = None if self.further_nS is None else torch.from_numpy(self.further_nS)
        return EncoderInput(tokens, mask_n, positions, users, items, further)

    def padded(self, pad_token: int) -> EncoderInput:
        mask_BL = np.arange(self.longest) < self.lengths_B[:, None]

        def pad(values_n: np.ndarray, fill: int) -> Tensor:
            array_BL = np.full((*mask_BL.shape, *values_n.shape[1:]), fill, np.int64)
            array_BL[mask_BL] = values_n
            return torch.from_numpy(array_BL)

        return EncoderInput(
            input_ids=pad(self.tokens_n, pad_token),
            attention_mask=torch.from_numpy(mask_BL),
            position_ids=pad(self.positions_n, 0),
            user_rows=pad(self.users_n, 0),
            item_rows=pad(self.items_n, 0),
            further_ids=None if self.further_nS is None else pad(self.further_nS, pad_token),
        )


def encode_histories(
    items: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout
) -> EncoderInput:
    """Encoder input of histories, [MASK] behind each unless the encoder is causal: what evaluation
    and requests ask the model.

    items int32 [total] rows, offsets int64 [B + 1], user_rows_B int64 [B] with -1 for an unknown
    user."""
    if layout.causal:
        return encode(layout.words.item_words(items), offsets, user_rows_B, layout)
    lengths_B = np.diff(offsets)
    inner = np.full(len(items) + len(lengths_B), FIRST_MASK_WORD, np.int64)
    flat, _ = ragged(offsets[:-1] + np.arange(len(lengths_B)), lengths_B)
    inner[flat] = layout.words.item_words(items)
    return encode(inner, offsets_of(lengths_B + 1), user_rows_B, layout)


def encode(
    inner: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout
) -> EncoderInput:
    """`<s> user item ... </s>` as padded arrays; too long: whole oldest words go, the user
    stays."""
    return write(inner, offsets, user_rows_B, layout).padded(layout.pad_token)


def write(inner: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout) -> Text:
    """`<s> user item ... </s>`, cut to length; for a causal encoder without `</s>`."""
    words = layout.words
    known_B = (user_rows_B >= 0) if layout.user_ids else np.zeros(len(user_rows_B), bool)
    user_words_B = np.full(len(user_rows_B), BOS_WORD)
    user_words_B[known_B] = words.user_words(user_rows_B[known_B])
    num_ends = 0 if layout.causal else 1
    user_tokens_B = np.where(known_B, layout.lengths[user_words_B], 0)
    inner, lengths_B = _truncate(
        inner, offsets, layout.max_tokens - 1 - num_ends - user_tokens_B, layout.lengths
    )

    sentence_offsets = offsets_of(lengths_B + 1 + num_ends + known_B)
    sentences = np.empty(sentence_offsets[-1], np.int64)
    first_B = sentence_offsets[:-1]
    sentences[first_B] = BOS_WORD
    sentences[first_B[known_B] + 1] = user_words_B[known_B]
    sentences[ragged(first_B + 1 + known_B, lengths_B)[0]] = inner
    sentences[sentence_offsets[1:][:, None] - 1 - np.arange(num_ends)] = EOS_WORD
    return _spell(sentences, sentence_offsets, layout)


def _truncate(
    inner: np.ndarray, offsets: np.ndarray, budget_B: np.ndarray, lengths_W: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the longest suffix of whole words within each sample's budget of tokens."""
    sample_W = np.repeat(np.arange(len(budget_B)), np.diff(offsets))
    ends = np.concatenate([[0], np.cumsum(lengths_W[inner])])
    suffix_W = ends[offsets[1:]][sample_W] - ends[:-1]
    keep_W = suffix_W <= budget_B[sample_W]
    return inner[keep_W], np.bincount(sample_W[keep_W], minlength=len(budget_B))


def _spell(sentences: np.ndarray, offsets: np.ndarray, layout: Layout) -> Text:
    """The tokens of words [W]; sentence b is the words from `offsets[b]` on."""
    words = layout.words
    flat, token_offsets = ragged(words.offsets[sentences], layout.lengths[sentences])
    ends = token_offsets[offsets]
    lengths_B = np.diff(ends)
    positions_n = np.arange(len(flat)) - np.repeat(ends[:-1], lengths_B)
    if layout.positions == "from-end":
        positions_n = np.repeat(lengths_B, lengths_B) - 1 - positions_n
    repeated = np.repeat(sentences, layout.lengths[sentences])
    return Text(
        tokens_n=words.tokens[flat].astype(np.int64),
        positions_n=positions_n,
        users_n=words.user_rows_of_words(repeated),
        items_n=words.item_rows_of_words(repeated),
        lengths_B=lengths_B,
        masks=np.flatnonzero((repeated >= FIRST_MASK_WORD) & (repeated < words.first_item_word)),
        further_nS=None if layout.unit == "subword" else _further(repeated, layout),
    )


def _further(words_n: np.ndarray, layout: Layout) -> np.ndarray:
    """int64 [n, S], sub-words of words behind the first."""
    words, columns = layout.words, np.arange(layout.num_further)
    places_nS = words.offsets[words_n, None] + 1 + columns
    has_nS = columns < words.lengths[words_n, None] - 1
    return np.where(has_nS, words.tokens[np.where(has_nS, places_nS, 0)], layout.pad_token).astype(
        np.int64
    )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ragged(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the pieces [start, start + length), and the pieces' offsets."""
    return flat_ranges(starts, lengths), offsets_of(lengths)
