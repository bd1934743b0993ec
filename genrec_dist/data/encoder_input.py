"""The encoder's input: sequences of words as tokens with positions and id rows, packed or
padded."""

# B samples, L input tokens, n tokens of all sequences, W words, S sub-words after the first

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from genrec_shards.sequences import flat_ranges, offsets_of
from torch import Tensor

from genrec_dist.data.layout import Layout, PromptLayout
from genrec_dist.data.packing import filled_size
from genrec_dist.data.word_table import (
    BOS_WORD,
    EOS_WORD,
    FIRST_MASK_WORD,
    HEAD_WORD,
    SEPARATOR_WORD,
)


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
