"""From samples to the tensors of one step: mask, truncate, gather tokens, pad."""

# B samples, R decoder rows, L input tokens, T target tokens

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from genrec_kernels import SumPlan
from genrec_shards.keyed import keyed_bits, keyed_uniform
from genrec_shards.plan import StepSamples
from genrec_shards.sequences import flat_ranges
from torch import Tensor

from genrec_dist.mask import STRATEGIES, Targets
from genrec_dist.recipe import Mask
from genrec_dist.tokens import BOS_WORD, EOS_WORD, FIRST_MASK_WORD, WordTable

IGNORED = -100
"""Label of positions that are not in the loss."""

WORTH_A_CUT = 4096
"""Padding tokens that cost more than one more micro-batch (two CPU cores, width 128: docs/log.md, 2026-11-21)."""


@dataclass(frozen=True)
class Layout:
    """What the encoder's input looks like; the same for training, evaluation and single requests."""

    words: WordTable
    pad_token: int
    max_tokens: int
    user_ids: bool
    positions: Literal["from-start", "from-end"]

    def __post_init__(self) -> None:
        if self.sure_items < 1:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the longest user and item, {self._user_tokens} and "
                f"{self.words.longest_item} sub-words, between <s> and </s>: raise it or train a larger vocabulary"
            )

    @property
    def sure_items(self) -> int:
        """Items that fit whatever their length; pretraining targets are drawn among these most recent ones."""
        return (self.max_tokens - 2 - self._user_tokens) // self.words.longest_item

    @property
    def _user_tokens(self) -> int:
        return self.words.longest_user if self.user_ids else 0


@dataclass(frozen=True)
class EncoderInput:
    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor
    """bool [B, L], False on padding."""
    position_ids: Tensor
    """int64 [B, L]."""
    user_rows: Tensor
    """int64 [B, L], row + 1 on the user's tokens, else 0."""
    item_rows: Tensor
    """int64 [B, L], row + 1 on an item's tokens, else 0."""

    def to(self, device: torch.device) -> EncoderInput:
        move = partial(Tensor.to, device=device, non_blocking=True)
        return EncoderInput(*(move(getattr(self, name)) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    encoder: EncoderInput
    encoder_row: Tensor
    """int64 [R], the encoder row each decoder row attends to."""
    decoder_input_ids: Tensor
    """int64 [R, T], first the mask to fill."""
    labels: Tensor
    """int64 [R, T], IGNORED on padding."""
    num_samples: int
    """Samples that count; padding samples do not."""
    num_target_tokens: int
    num_tokens: int
    """Real tokens of encoder and decoder."""
    num_slots: int
    """Tokens with padding: B x L + R x T."""
    plan: SumPlan | None = None
    """For the backward of the embedding kernel, where that is used."""

    def to(self, device: torch.device) -> Batch:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("encoder", "encoder_row", "decoder_input_ids", "labels", "plan"):
            values[name] = None if values[name] is None else values[name].to(device)
        return Batch(**values)


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a step."""

    micro_batches: list[Batch]
    samples_digest: int
    """int64, the wrapping sum of hashes of (sample id, its targets), padding left out: ranks add theirs up, and two runs that
    agree in it took the same samples with the same masks, whatever the number of ranks."""
    num_samples: int
    """Samples that count."""
    num_padding: int
    """Repeated samples that only even out the ranks."""
    id_rows: dict[str, Tensor] = field(default_factory=dict)
    """`user`, `item` -> int64 [u], the step's distinct table rows, ascending, where id tables live outside the model; the
    micro-batches then hold places among them."""

    @property
    def num_target_tokens(self) -> int:
        return sum(batch.num_target_tokens for batch in self.micro_batches)


def idle_batch(batch: Batch) -> Batch:
    """One sample that teaches nothing: a rank that has run out of micro-batches goes through the layers with it."""
    one = EncoderInput(*(getattr(batch.encoder, name)[-1:] for name in EncoderInput.__dataclass_fields__))
    return Batch(
        encoder=one,
        encoder_row=torch.zeros(1, dtype=torch.long),
        decoder_input_ids=batch.decoder_input_ids[-1:],
        labels=torch.full_like(batch.labels[-1:], IGNORED),
        num_samples=0,
        num_target_tokens=0,
        num_tokens=0,
        num_slots=one.input_ids.numel() + batch.labels.shape[1],
    )


class SequenceSource(Protocol):
    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(items int32 [total], offsets int64 [B + 1]) of these users' whole sequences."""


@dataclass(frozen=True)
class MaskedSamples:
    """Inner words of each encoder row and what the decoder rows generate."""

    words: np.ndarray
    """int64 [total], item and mask words, oldest first."""
    offsets: np.ndarray
    """int64 [B + 1]."""
    row_sample: np.ndarray
    """int64 [R], sample of each decoder row."""
    row_mask: np.ndarray
    """int64 [R], number of the mask the row fills."""
    target_items: np.ndarray
    """int32 [total targets], item rows."""
    target_offsets: np.ndarray
    """int64 [R + 1]."""


def make_step(
    samples: StepSamples,
    source: SequenceSource,
    layout: Layout,
    *,
    mask: Mask | None,
    seed: int,
    epoch: int,
    micro_batch_tokens: int,
) -> RankStep:
    """A rank's samples of a step as micro-batches of samples of like length (the sum over a step has no order).

    `mask` is the strategy, or None for [MASK] after the history. A micro-batch holds at most `micro_batch_tokens` encoder
    tokens, padding included (one sample at least).
    """
    items, offsets = source.gather(samples.user_rows)
    starts_B = offsets[:-1]
    if mask is None:
        # The target of a finetuning sample stands behind its history: it is read, then shown as [MASK].
        ends_B = starts_B + samples.target_positions + 1
        targets = Targets(samples.target_positions.astype(np.int64)[:, None], together=False)
    else:
        ends_B = starts_B + samples.training_lengths
        targets = choose_targets(samples, layout, mask, seed, epoch)
    tokens_B = _token_lengths(items, starts_B, ends_B, samples.user_rows, targets, layout)
    batches = []
    for part in cut(tokens_B, micro_batch_tokens):
        positions_bK = targets.positions_BK[part]
        masked = apply_mask(items, starts_B[part], ends_B[part], positions_bK, targets.together, layout.words)
        batches.append(collate(masked, samples.user_rows[part], samples.is_padding[part], layout))
    num_padding = int(samples.is_padding.sum())
    return RankStep(batches, digest(samples, targets), len(samples) - num_padding, num_padding)


def digest(samples: StepSamples, targets: Targets) -> int:
    """`RankStep.samples_digest` of samples and the targets chosen for them."""
    hashes_B = keyed_bits(0, samples.sample_ids)
    for column, positions_B in enumerate(targets.positions_BK.T):
        hashes_B ^= keyed_bits(column + 1, positions_B ^ samples.sample_ids)
    return int(hashes_B[~samples.is_padding].sum(dtype=np.uint64).astype(np.int64))


def _token_lengths(
    items: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    user_rows_B: np.ndarray,
    targets: Targets,
    layout: Layout,
) -> np.ndarray:
    """int64 [B], encoder tokens of each sample; too long ones count as full.

    A target counts as its mask: were it counted as itself, its length would choose the samples it is padded beside.
    """
    words = layout.words
    item_tokens = words.lengths[words.item_words(items)]
    before = _offsets(item_tokens)
    user_tokens_B = words.lengths[words.user_words(user_rows_B)] if layout.user_ids else 0
    sample_T, column_T = np.nonzero(targets.positions_BK >= 0)
    target_tokens_T = item_tokens[starts_B[sample_T] + targets.positions_BK[sample_T, column_T]]
    mask_tokens_T = (column_T == 0) | (not targets.together)
    hidden_B = np.bincount(sample_T, target_tokens_T - mask_tokens_T, len(starts_B)).astype(np.int64)
    return np.minimum(before[ends_B] - before[starts_B] - hidden_B + user_tokens_B + 2, layout.max_tokens)


def cut(tokens_B: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Samples by descending length as [indices, ...]: cut where the padded rectangle would exceed the budget, or where
    its padding would cost more than another micro-batch does."""
    order = np.argsort(-tokens_B, kind="stable")
    lengths = tokens_B[order]
    parts, start = [], 0
    while start < len(order):
        longest = int(lengths[start])
        fitting = lengths[start : start + max(1, micro_batch_tokens // longest)]
        size = max(1, int(np.searchsorted(np.cumsum(longest - fitting), WORTH_A_CUT, side="right")))
        parts.append(order[start : start + size])
        start += size
    return parts


def choose_targets(samples: StepSamples, layout: Layout, mask: Mask, seed: int, epoch: int) -> Targets:
    """Targets inside the training parts, among the most recent items that are sure to fit."""
    lengths_B = samples.training_lengths.astype(np.int64)
    allowed_B = np.minimum(lengths_B, layout.sure_items)
    chosen = STRATEGIES[mask.strategy](allowed_B, partial(keyed_uniform, seed, epoch, samples.sample_ids), mask)
    shift_B1 = (lengths_B - allowed_B)[:, None]
    return Targets(np.where(chosen.positions_BK < 0, -1, chosen.positions_BK + shift_B1), chosen.together)


def apply_mask(
    items: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    positions_BK: np.ndarray,
    together: bool,
    words: WordTable,
) -> MaskedSamples:
    """Replace the targets by masks. Nothing at or behind `ends_B` is read.

    `positions_BK` count from `starts_B`, ascending, -1 for none.
    """
    flat, offsets = ragged(starts_B, ends_B - starts_B)
    inner = words.item_words(items[flat])
    sample_T, column_T = np.nonzero(positions_BK >= 0)
    assert together or column_T.max(initial=0) < words.num_masks
    places_T = offsets[sample_T] + positions_BK[sample_T, column_T]
    target_items = items[flat[places_T]]
    if not together:
        inner[places_T] = FIRST_MASK_WORD + column_T
        target_offsets = np.arange(len(places_T) + 1)
        return MaskedSamples(inner, offsets, sample_T, column_T, target_items, target_offsets)
    keep = np.ones(len(inner), bool)
    keep[places_T] = column_T == 0
    inner[places_T] = FIRST_MASK_WORD
    counts_B = (positions_BK >= 0).sum(axis=1)
    kept_B = np.diff(offsets) - np.maximum(counts_B - 1, 0)
    rows = np.arange(len(starts_B))
    return MaskedSamples(inner[keep], _offsets(kept_B), rows, np.zeros_like(rows), target_items, _offsets(counts_B))


def collate(masked: MaskedSamples, user_rows_B: np.ndarray, is_padding_B: np.ndarray, layout: Layout) -> Batch:
    """Gather tokens and pad. Padding samples keep their place and lose their labels."""
    encoder = encode(masked.words, masked.offsets, user_rows_B, layout)
    return _with_targets(encoder, masked, is_padding_B, layout)


def target_batch(encoder: EncoderInput, target_items_B: np.ndarray, layout: Layout) -> Batch:
    """The batch that asks each encoded history for one item: what a validation loss is taken of."""
    rows_B = np.arange(len(target_items_B))
    masked = MaskedSamples(
        words=np.empty(0, np.int64),
        offsets=np.zeros(1, np.int64),
        row_sample=rows_B,
        row_mask=np.zeros_like(rows_B),
        target_items=target_items_B,
        target_offsets=np.arange(len(rows_B) + 1),
    )
    return _with_targets(encoder, masked, np.zeros(len(rows_B), bool), layout)


def _with_targets(encoder: EncoderInput, masked: MaskedSamples, is_padding_B: np.ndarray, layout: Layout) -> Batch:
    labels_RT, decoder_RT = _decoder_rows(masked, layout)
    labels_RT[is_padding_B[masked.row_sample]] = IGNORED
    num_target_tokens = int((labels_RT != IGNORED).sum())
    encoder_tokens = int(encoder.attention_mask[torch.from_numpy(~is_padding_B)].sum())
    return Batch(
        encoder=encoder,
        encoder_row=torch.from_numpy(masked.row_sample),
        decoder_input_ids=torch.from_numpy(decoder_RT),
        labels=torch.from_numpy(labels_RT),
        num_samples=int((~is_padding_B).sum()),
        num_target_tokens=num_target_tokens,
        num_tokens=encoder_tokens + num_target_tokens,
        num_slots=encoder.input_ids.numel() + labels_RT.size,
    )


def encode_histories(items: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout) -> EncoderInput:
    """Encoder input of histories with [MASK] behind each: what evaluation and requests ask the model.

    items int32 [total] rows, offsets int64 [B + 1], user_rows_B int64 [B] with -1 for an unknown user.
    """
    lengths_B = np.diff(offsets)
    inner = np.full(len(items) + len(lengths_B), FIRST_MASK_WORD, np.int64)
    flat, _ = ragged(offsets[:-1] + np.arange(len(lengths_B)), lengths_B)
    inner[flat] = layout.words.item_words(items)
    return encode(inner, _offsets(lengths_B + 1), user_rows_B, layout)


def encode(inner: np.ndarray, offsets: np.ndarray, user_rows_B: np.ndarray, layout: Layout) -> EncoderInput:
    """`<s> user item ... </s>` as padded arrays; too long: whole oldest words go, the user stays."""
    words = layout.words
    known_B = (user_rows_B >= 0) if layout.user_ids else np.zeros(len(user_rows_B), bool)
    user_words_B = np.full(len(user_rows_B), BOS_WORD)
    user_words_B[known_B] = words.user_words(user_rows_B[known_B])
    user_tokens_B = np.where(known_B, words.lengths[user_words_B], 0)
    inner, lengths_B = _truncate(inner, offsets, layout.max_tokens - 2 - user_tokens_B, words)

    sentence_offsets = _offsets(lengths_B + 2 + known_B)
    sentences = np.empty(sentence_offsets[-1], np.int64)
    first_B = sentence_offsets[:-1]
    sentences[first_B] = BOS_WORD
    sentences[first_B[known_B] + 1] = user_words_B[known_B]
    sentences[ragged(first_B + 1 + known_B, lengths_B)[0]] = inner
    sentences[sentence_offsets[1:] - 1] = EOS_WORD
    return _pad_sentences(sentences, sentence_offsets, layout)


def _truncate(
    inner: np.ndarray, offsets: np.ndarray, budget_B: np.ndarray, words: WordTable
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the longest suffix of whole words within each sample's budget of tokens."""
    sample_W = np.repeat(np.arange(len(budget_B)), np.diff(offsets))
    ends = np.concatenate([[0], np.cumsum(words.lengths[inner])])
    suffix_W = ends[offsets[1:]][sample_W] - ends[:-1]
    keep_W = suffix_W <= budget_B[sample_W]
    return inner[keep_W], np.bincount(sample_W[keep_W], minlength=len(budget_B))


def _pad_sentences(sentences: np.ndarray, offsets: np.ndarray, layout: Layout) -> EncoderInput:
    words = layout.words
    flat, token_offsets = ragged(words.offsets[sentences], words.lengths[sentences])
    ends = token_offsets[offsets]
    lengths_B = np.diff(ends)
    mask_BL = np.arange(lengths_B.max(initial=0)) < lengths_B[:, None]
    repeated = np.repeat(sentences, words.lengths[sentences])

    def padded(values: np.ndarray, fill: int) -> Tensor:
        array_BL = np.full(mask_BL.shape, fill, np.int64)
        array_BL[mask_BL] = values
        return torch.from_numpy(array_BL)

    positions = np.arange(len(flat)) - np.repeat(ends[:-1], lengths_B)
    if layout.positions == "from-end":
        positions = np.repeat(lengths_B, lengths_B) - 1 - positions
    return EncoderInput(
        input_ids=padded(words.tokens[flat], layout.pad_token),
        attention_mask=torch.from_numpy(mask_BL),
        position_ids=padded(positions, 0),
        user_rows=padded(words.user_rows_of_words(repeated), 0),
        item_rows=padded(words.item_rows_of_words(repeated), 0),
    )


def _decoder_rows(masked: MaskedSamples, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(labels, decoder inputs), int64 [R, T]: items' tokens and `</s>`; the same behind the mask to fill."""
    words = layout.words
    item_words = words.item_words(masked.target_items)
    item_tokens = words.lengths[item_words]
    flat, token_offsets = ragged(words.offsets[item_words], item_tokens)
    lengths_R = np.diff(token_offsets[masked.target_offsets])
    columns = np.arange(lengths_R.max(initial=0) + 1)
    labels_RT = np.full((len(lengths_R), len(columns)), IGNORED, np.int64)
    labels_RT[columns < lengths_R[:, None]] = words.tokens[flat]
    labels_RT[np.arange(len(lengths_R)), lengths_R] = words.tokens[words.offsets[EOS_WORD]]
    decoder_RT = np.empty_like(labels_RT)
    decoder_RT[:, 0] = words.tokens[words.offsets[FIRST_MASK_WORD + masked.row_mask]]
    decoder_RT[:, 1:] = np.where(labels_RT[:, :-1] == IGNORED, layout.pad_token, labels_RT[:, :-1])
    return labels_RT, decoder_RT


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ragged(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the pieces [start, start + length), and the pieces' offsets."""
    return flat_ranges(starts, lengths), _offsets(lengths)
