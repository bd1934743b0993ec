"""The encoder's input: sequences of words as tokens with positions and id rows, packed or
padded."""

# B samples, L input tokens, n tokens of all sequences, W words, S sub-words after the first

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from genrec_shards.sequences import flat_ranges, offsets_of
from torch import Tensor

from genrec_dist.config.recipe import EncoderUnit
from genrec_dist.data.packing import filled_size
from genrec_dist.data.word_table import (
    BOS_WORD,
    EOS_WORD,
    FIRST_MASK_WORD,
    HEAD_WORD,
    SEPARATOR_WORD,
    TAIL_WORD,
    WordTable,
)


@dataclass(frozen=True)
class ForcedTokens:
    """Tokens of the items' words that are the only continuation in the trie
    (`trie.forced_tokens`)."""

    tokens: np.ndarray
    """bool [total], as `WordTable.tokens`."""
    ends: np.ndarray
    """bool [W], whether only </s> can follow a word."""


@dataclass(frozen=True)
class Layout:
    """The form of the encoder's input; the same for training, evaluation and single requests.

    Raises:
        ValueError: `max_tokens` has no room for the longest user and item.
    """

    words: WordTable
    pad_token: int
    max_tokens: int
    """Most encoder positions."""
    user_ids: bool
    positions: Literal["from-start", "from-end"]
    unit: EncoderUnit = "subword"
    causal: bool = False
    """No [MASK] and no </s> after a history."""
    forced: ForcedTokens | None = None
    """Tokens of targets that are not learned; None: all are."""

    def __post_init__(self) -> None:
        if self.sure_items < 1:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the longest user and item, "
                f"{self._longest_user} and {self.longest_item} positions, between <s> and </s>: "
                "raise it, train a larger vocabulary or let an item be one position "
                "(model.encoder_unit)"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [W], encoder positions of each word."""
        return self.words.lengths if self.unit == "subword" else np.ones_like(self.words.lengths)

    @property
    def written_lengths(self) -> np.ndarray:
        """int64 [W], the same without what comes between two words."""
        return self.lengths

    @property
    def head_length(self) -> int:
        """Positions before the user and the items: `<s>`."""
        return 1

    @property
    def max_items(self) -> int:
        """Most items of a history that are read, as far as they fit."""
        return self.max_tokens

    @property
    def lead(self) -> np.ndarray:
        """int64, what a decoder row has before the input whose output is its first label."""
        return np.empty(0, np.int64)

    @property
    def row_length(self) -> int:
        """Tokens of a decoder row that count where micro-batches are cut."""
        return 0

    @property
    def num_further(self) -> int:
        """S, most sub-words after the first that a position has."""
        if self.unit == "subword":
            return 0
        return max(self.words.longest_item, self.words.longest_user if self.user_ids else 0) - 1

    @property
    def sure_items(self) -> int:
        """Number of items that fit whatever their lengths; pretraining targets are drawn among
        these most recent ones."""
        return (self.max_tokens - 2 - self._longest_user) // self.longest_item

    @property
    def longest_item(self) -> int:
        """Encoder positions of the item's word that takes most."""
        return self.words.longest_item if self.unit == "subword" else 1

    @property
    def _longest_user(self) -> int:
        if not self.user_ids:
            return 0
        return self.words.longest_user if self.unit == "subword" else 1


@dataclass(frozen=True)
class PromptLayout(Layout):
    """The form of a prompt (`data/prompt/`): its head, and titles with separators between
    them, are what an encoder reads; its tail and the answer are a decoder row.

    So an item has room for its title and one separator, and the head for one separator less: a
    history of two titles has head + title + separator + title.

    Raises:
        ValueError: `max_tokens` has no room for the head and the longest title.
    """

    max_titles: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < self.head_length + self.longest_item:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the prompt's {self.head} tokens "
                f"before the history and the longest title's {self.words.longest_item}: raise it"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        lengths = self.words.lengths.copy()
        lengths[self.words.first_item_word :] += self.separator
        return lengths

    @property
    def written_lengths(self) -> np.ndarray:
        return self.words.lengths

    @property
    def head(self) -> int:
        """Tokens before the first title."""
        return int(self.words.lengths[HEAD_WORD])

    @property
    def separator(self) -> int:
        """Tokens between two titles."""
        return int(self.words.lengths[SEPARATOR_WORD])

    @property
    def head_length(self) -> int:
        return self.head - self.separator

    @property
    def max_items(self) -> int:
        return self.max_titles

    @property
    def longest_item(self) -> int:
        return self.words.longest_item + self.separator

    @cached_property
    def tail(self) -> np.ndarray:
        """int64, the tokens after the history."""
        first, last = self.words.offsets[TAIL_WORD : TAIL_WORD + 2]
        return self.words.tokens[first:last].astype(np.int64)

    @property
    def lead(self) -> np.ndarray:
        return self.tail[:-1]

    @property
    def row_length(self) -> int:
        # With a mean title: a target's own length would choose what its sample is cut beside.
        return len(self.tail) + len(self.words.tokens_of_items()[0]) // self.words.num_items + 1


@dataclass(frozen=True)
class EncoderInput:
    """Sequences padded to the longest, [B, L]; or packed without padding, [n], with a `Packing`
    that says where each starts."""

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
    """int64 [B, L, S], where a position is a word: its sub-words after the first, then <pad>."""

    def map(self, change: Callable[[Tensor], Tensor]) -> EncoderInput:
        """A copy with each array changed."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: None if value is None else change(value) for name, value in values.items()}
        return EncoderInput(**changed)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> EncoderInput:
        return self.map(lambda values: values.to(device, non_blocking=True))


@dataclass(frozen=True)
class FlatSequences:
    """Encoder sequences one after another in flat arrays."""

    tokens_n: np.ndarray
    """int64 [n], as are the next three."""
    positions_n: np.ndarray
    users_n: np.ndarray
    items_n: np.ndarray
    lengths_B: np.ndarray
    """int64 [B], tokens of each sequence."""
    masks: np.ndarray
    """int64, indices of the mask tokens, ascending."""
    further_nS: np.ndarray | None = None
    """int64 [n, S], as `EncoderInput.further_ids`."""

    @property
    def longest(self) -> int:
        return int(self.lengths_B.max(initial=0))

    @property
    def padded_masks(self) -> np.ndarray:
        """int64, indices of the mask tokens in the padded arrays, [B x L]."""
        ends_B = np.cumsum(self.lengths_B)
        rows = np.searchsorted(ends_B, self.masks, side="right")
        return rows * self.longest + self.masks - (ends_B - self.lengths_B)[rows]

    def with_padding_sequence(self, pad_token: int) -> FlatSequences:
        """A copy with a last sequence of at least one <pad>, so that few numbers of tokens
        occur (`filled_size`)."""
        missing = filled_size(len(self.tokens_n) + 1) - len(self.tokens_n)
        zeros, further_nS = np.zeros(missing, np.int64), self.further_nS
        if further_nS is not None:
            further_nS = np.pad(further_nS, ((0, missing), (0, 0)), constant_values=pad_token)
        return FlatSequences(
            tokens_n=np.append(self.tokens_n, zeros + pad_token),
            positions_n=np.append(self.positions_n, zeros),
            users_n=np.append(self.users_n, zeros),
            items_n=np.append(self.items_n, zeros),
            lengths_B=np.append(self.lengths_B, missing),
            masks=self.masks,
            further_nS=further_nS,
        )

    def packed(self) -> EncoderInput:
        """The arrays as they are, [n]."""
        return EncoderInput(
            input_ids=torch.from_numpy(self.tokens_n),
            attention_mask=torch.ones(1, dtype=torch.bool).expand(len(self.tokens_n)),
            position_ids=torch.from_numpy(self.positions_n),
            user_rows=torch.from_numpy(self.users_n),
            item_rows=torch.from_numpy(self.items_n),
            further_ids=None if self.further_nS is None else torch.from_numpy(self.further_nS),
        )

    def padded(self, pad_token: int) -> EncoderInput:
        """The sequences as rows padded to the longest, [B, L]."""
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
    """The padded encoder input of histories, with [MASK] after each unless the encoder is causal:
    what evaluation and requests read.

    Args:
        items: int32 [total], item rows.
        offsets: int64 [B + 1], the first item of each history.
        user_rows_B: int64 [B], -1 for an unknown user.
        layout: as the model was trained with.
    """
    words = layout.words.item_words(items)
    if not layout.causal:
        lengths_B = np.diff(offsets)
        with_masks = np.full(len(items) + len(lengths_B), FIRST_MASK_WORD, np.int64)
        with_masks[flat_ranges(offsets[:-1] + np.arange(len(lengths_B)), lengths_B)] = words
        words, offsets = with_masks, offsets_of(lengths_B + 1)
    return encode_words(words, offsets, user_rows_B, layout).padded(layout.pad_token)


def encode_words(
    words: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout
) -> FlatSequences:
    """The sequences `<s> user item ... </s>`; for a causal encoder without `</s>`. Where one is too
    long, whole words are left out, oldest first; the user stays.

    Args:
        words: int64 [total], item and mask words, oldest first.
        offsets: int64 [B + 1], the first word of each sample.
        user_rows_B: int64 [B], -1 for an unknown user.
        layout: lengths, positions and which words there are.
    """
    if isinstance(layout, PromptLayout):
        return _prompts(words, offsets, layout)
    known_B = (user_rows_B >= 0) & layout.user_ids
    user_words_B = np.full(len(user_rows_B), BOS_WORD)
    user_words_B[known_B] = layout.words.user_words(user_rows_B[known_B])
    num_ends = 0 if layout.causal else 1

    # The longest suffix of whole words within each sample's room.
    room_B = layout.max_tokens - 1 - num_ends - np.where(known_B, layout.lengths[user_words_B], 0)
    sample_W = np.repeat(np.arange(len(room_B)), np.diff(offsets))
    before = offsets_of(layout.lengths[words])
    keep_W = before[offsets[1:]][sample_W] - before[:-1] <= room_B[sample_W]
    kept_B = np.bincount(sample_W[keep_W], minlength=len(room_B))

    sequence_offsets = offsets_of(kept_B + 1 + num_ends + known_B)
    sequences = np.empty(sequence_offsets[-1], np.int64)
    first_B = sequence_offsets[:-1]
    sequences[first_B] = BOS_WORD
    sequences[first_B[known_B] + 1] = user_words_B[known_B]
    sequences[flat_ranges(first_B + 1 + known_B, kept_B)] = words[keep_W]
    sequences[sequence_offsets[1:][:, None] - 1 - np.arange(num_ends)] = EOS_WORD
    return _tokens_of(sequences, sequence_offsets, layout)


def _prompts(words: np.ndarray, offsets: np.ndarray, layout: PromptLayout) -> FlatSequences:
    """The prompts of histories up to their tail; no token has an id row."""
    # The latest titles that fit.
    num_words_B = np.diff(offsets)
    sample_W = np.repeat(np.arange(len(num_words_B)), num_words_B)
    before = offsets_of(layout.lengths[words])
    fits_W = before[offsets[1:]][sample_W] - before[:-1] <= layout.max_tokens - layout.head_length
    keep_W = fits_W & (offsets[1:][sample_W] - np.arange(len(words)) <= layout.max_titles)
    kept_B = np.bincount(sample_W[keep_W], minlength=len(num_words_B))
    # Two histories, a b and none: sequences = [HEAD a SEPARATOR b | HEAD]
    sequence_offsets = offsets_of(np.maximum(2 * kept_B, 1))
    sequences = np.full(sequence_offsets[-1], SEPARATOR_WORD)
    sequences[sequence_offsets[:-1]] = HEAD_WORD
    first_W = np.repeat(sequence_offsets[:-1] + 1 - 2 * offsets_of(kept_B)[:-1], kept_B)
    sequences[first_W + 2 * np.arange(len(first_W))] = words[keep_W]
    flat = _tokens_of(sequences, sequence_offsets, layout)
    return replace(flat, items_n=np.zeros_like(flat.items_n))


def _tokens_of(sequences: np.ndarray, offsets: np.ndarray, layout: Layout) -> FlatSequences:
    """The tokens of sequences of words; sequence b starts at word `offsets[b]`."""
    table, lengths = layout.words, layout.written_lengths[sequences]
    ends = offsets_of(lengths)[offsets]
    lengths_B = np.diff(ends)
    words_n = np.repeat(sequences, lengths)
    positions_n = np.arange(len(words_n)) - np.repeat(ends[:-1], lengths_B)
    if layout.positions == "from-end":
        positions_n = np.repeat(lengths_B, lengths_B) - 1 - positions_n
    further_nS = None
    if layout.unit != "subword":
        columns = np.arange(layout.num_further)
        has_nS = columns < table.lengths[words_n, None] - 1
        places_nS = np.where(has_nS, table.offsets[words_n, None] + 1 + columns, 0)
        further_nS = np.where(has_nS, table.tokens[places_nS], layout.pad_token).astype(np.int64)
    is_mask_n = (words_n >= FIRST_MASK_WORD) & (words_n < table.first_item_word)
    return FlatSequences(
        tokens_n=table.tokens[flat_ranges(table.offsets[sequences], lengths)].astype(np.int64),
        positions_n=positions_n,
        users_n=table.user_rows_of_words(words_n),
        items_n=table.item_rows_of_words(words_n),
        lengths_B=lengths_B,
        masks=np.flatnonzero(is_mask_n),
        further_nS=further_nS,
    )


def ragged(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the segments [start, start + length) of an array, and the segments'
    offsets among them."""
    return flat_ranges(starts, lengths), offsets_of(lengths)
