"""A rank's samples of a step as micro-batches: choose targets, split by length, mask, gather
tokens, pad or pack."""

# B samples, b samples of a micro-batch, K targets of a sample, T targets, R decoder rows, L input
# tokens; packed: n input tokens, m target tokens

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from genrec_shards.keyed_random import keyed_bits, keyed_uniform
from genrec_shards.sequences import flat_ranges, offsets_of
from genrec_shards.storage.sample_order import StepSamples

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import (
    IGNORED,
    Batch,
    ItemTargets,
    ModelInputs,
    RankStep,
    SampleRows,
    Work,
)
from genrec_dist.data.encoder_input import EncoderInput, FlatSequences, Layout, encode_words, ragged
from genrec_dist.data.packing import Packing, filled_size, segments_of
from genrec_dist.data.samples.masking import STRATEGIES, Targets
from genrec_dist.data.samples.prefix_samples import PrefixSegments, prefix_segments
from genrec_dist.data.word_table import EOS_WORD, FIRST_MASK_WORD, WordTable

WORTH_A_BATCH = 4096
"""Padding tokens that cost more than one more micro-batch (two CPU cores, width 128: docs/log.md,
2026-11-21)."""


class SequenceSource(Protocol):
    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(items int32 [total], offsets int64 [B + 1]) of these users' whole sequences."""


@dataclass(frozen=True)
class BatchOptions:
    """How samples become micro-batches."""

    micro_batch_tokens: int
    """Most encoder tokens of a micro-batch, padding included; one sample is always taken."""
    seed: int = 0
    mask: Mask | None = None
    """The strategy that chooses targets; None: [MASK] after the history."""
    packed: bool = False
    """No padding: sequences one after another."""
    item_targets: bool = False
    """For a model with an item head, or one whose decoder starts from a state."""
    all_prefixes: bool = False
    """Each item of a training part but the first is a target (causal encoders)."""
    share_windows: bool = False
    """With all_prefixes: targets whose history is too long share windows (`prefix_segments`)."""


@dataclass(frozen=True)
class MaskedSamples:
    """The words of each encoder row between user and </s>, and what the decoder rows generate."""

    words: np.ndarray
    """int64 [total], item and mask words, oldest first."""
    offsets: np.ndarray
    """int64 [B + 1]."""
    row_sample: np.ndarray
    """int64 [R], sample of each decoder row."""
    row_mask: np.ndarray
    """int64 [R], number of the mask that the row fills."""
    target_items: np.ndarray
    """int32 [total targets], item rows."""
    target_offsets: np.ndarray
    """int64 [R + 1]."""
    visible_R: np.ndarray | None = None
    """int64 [R], how many of its sample's encoder tokens each decoder row attends to; None: all."""
    counted_B: np.ndarray | None = None
    """bool [B], encoder rows that count as a sample; None: all."""
    learned_R: np.ndarray | None = None
    """bool [R], decoder rows that are in the loss; None: all."""

    def ignored_R(self, is_padding_B: np.ndarray) -> np.ndarray:
        """bool [R], decoder rows that are not in the loss."""
        of_padding_R: np.ndarray = is_padding_B[self.row_sample]
        return of_padding_R if self.learned_R is None else of_padding_R | ~self.learned_R


def make_step(
    samples: StepSamples, source: SequenceSource, layout: Layout, options: BatchOptions, epoch: int
) -> RankStep:
    """A rank's samples of a step as micro-batches of samples of like length. (The sum over a step
    does not depend on the order.)

    Args:
        samples: the rank's, padding samples included.
        source: of the users' items.
        layout: of the encoder's input.
        options: of the stage.
        epoch: counted over all stages; with seed and sample id it decides each mask.
    """
    items, offsets = source.gather(samples.user_rows)
    starts_B, ends_B = offsets[:-1], offsets[:-1] + samples.training_lengths
    segments = None
    if layout.causal:
        last_B = samples.training_lengths - 1 if options.all_prefixes else samples.target_positions
        targets = Targets(last_B.astype(np.int64)[:, None], together=False)
        segments = prefix_segments(
            items,
            starts_B,
            starts_B + last_B + 1,
            samples.user_rows,
            layout,
            options.all_prefixes,
            share_windows=options.share_windows,
        )
        tokens = segments.tokens_P + np.diff(segments.row_offsets_P) * layout.row_length
    else:
        if options.mask is None:
            # A finetuning target follows its history: it is gathered, then replaced by [MASK].
            ends_B = starts_B + samples.target_positions + 1
            targets = Targets(samples.target_positions.astype(np.int64)[:, None], together=False)
        else:
            targets = choose_targets(samples, layout, options.mask, options.seed, epoch)
        tokens = _token_lengths(items, starts_B, ends_B, samples.user_rows, targets, layout)

    batches = []
    split = split_packed if options.packed else split_padded
    for part in split(tokens, options.micro_batch_tokens):
        if segments is not None:
            masked, samples_b = _prefix_rows(items, segments, part, layout), segments.sample_P[part]
        else:
            of_part = Targets(targets.positions_BK[part], targets.together)
            masked = apply_mask(items, starts_B[part], ends_B[part], of_part, layout.words)
            samples_b = part
        user_rows_b, is_padding_b = samples.user_rows[samples_b], samples.is_padding[samples_b]
        batches.append(collate(masked, user_rows_b, is_padding_b, layout, options))
    num_padding = int(samples.is_padding.sum())
    return RankStep(
        micro_batches=batches,
        samples_digest=digest(samples, targets),
        num_samples=len(samples) - num_padding,
        num_padding=num_padding,
    )


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

    A target counts as its mask. Counted as itself, its length would choose which samples it is
    padded beside, and so leak."""
    words = layout.words
    item_tokens = layout.lengths[words.item_words(items)]
    before = offsets_of(item_tokens)
    user_tokens_B = layout.lengths[words.user_words(user_rows_B)] if layout.user_ids else 0
    sample_T, column_T = np.nonzero(targets.positions_BK >= 0)
    target_tokens_T = item_tokens[starts_B[sample_T] + targets.positions_BK[sample_T, column_T]]
    mask_tokens_T = (column_T == 0) | (not targets.together)
    hidden_B = np.bincount(sample_T, target_tokens_T - mask_tokens_T, len(starts_B))
    shown_B = before[ends_B] - before[starts_B] - hidden_B.astype(np.int64)
    return np.minimum(shown_B + user_tokens_B + 2, layout.max_tokens)


def split_padded(tokens_B: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Indices of samples by micro-batch, longest first. One ends where its padded rectangle would
    exceed the budget, or where its padding would cost more than another micro-batch."""
    order = np.argsort(-tokens_B, kind="stable")
    lengths = tokens_B[order]
    parts, start = [], 0
    while start < len(order):
        longest = int(lengths[start])
        fitting = lengths[start : start + max(1, micro_batch_tokens // longest)]
        padding = np.cumsum(longest - fitting)
        size = max(1, int(np.searchsorted(padding, WORTH_A_BATCH, side="right")))
        parts.append(order[start : start + size])
        start += size
    return parts


def split_packed(tokens_B: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Indices of samples by micro-batch, longest first: as few micro-batches as the budget allows,
    of nearly equal numbers of tokens."""
    order = np.argsort(-tokens_B, kind="stable")
    before = offsets_of(tokens_B[order])
    parts = 1
    while True:
        shares = np.arange(1, parts) * (int(before[-1]) / parts)
        firsts = np.searchsorted(before[1:], shares, side="left")
        bounds = np.unique(np.concatenate([[0], firsts, [len(order)]]))
        sizes = np.diff(before[bounds])
        if np.all((sizes <= micro_batch_tokens) | (np.diff(bounds) == 1)):
            return [order[first:last] for first, last in pairwise(bounds)]
        parts += 1


def choose_targets(
    samples: StepSamples, layout: Layout, mask: Mask, seed: int, epoch: int
) -> Targets:
    """Targets inside the training parts, among the most recent items that are sure to fit."""
    lengths_B = samples.training_lengths.astype(np.int64)
    allowed_B = np.minimum(lengths_B, layout.sure_items)
    draw = partial(keyed_uniform, seed, epoch, samples.sample_ids)
    chosen = STRATEGIES[mask.strategy](allowed_B, draw, mask)
    shifted_BK = chosen.positions_BK + (lengths_B - allowed_B)[:, None]
    return Targets(np.where(chosen.positions_BK < 0, -1, shifted_BK), chosen.together)


def apply_mask(
    items: np.ndarray, starts_B: np.ndarray, ends_B: np.ndarray, targets: Targets, words: WordTable
) -> MaskedSamples:
    """The samples with their targets replaced by masks. No item from `ends_B` on is read.

    Args:
        items: int32 [total], item rows.
        starts_B: int64 [B], index of each sample's first item, from which positions count.
        ends_B: int64 [B], exclusive.
        targets: positions of the targets.
        words: of the items and masks.
    """
    # Three users, items 0 to 3, sequences 0 1 2 | 3 | 1 0, M and N the first and second mask:
    #   positions_BK = [[0 2] [0 -1] [1 -1]], each target with a mask of its own:
    #     places_T = [0 2 3 5], column_T = [0 1 0 0], words = [M 1 N | M | 1 M],
    #     row_sample = [0 0 1 2], target_items = [0 2 3 0], target_offsets = [0 1 2 3 4]
    #   positions_BK = [[0 1] [0 -1] [0 1]], one mask for all of a sample (together):
    #     words = [M 2 | M | M], row_sample = [0 1 2], target_items = [0 1 | 3 | 1 0],
    #     target_offsets = [0 2 3 5]
    positions_BK = targets.positions_BK
    flat, offsets = ragged(starts_B, ends_B - starts_B)
    masked = words.item_words(items[flat])
    sample_T, column_T = np.nonzero(positions_BK >= 0)
    assert targets.together or column_T.max(initial=0) < words.num_masks
    places_T = offsets[sample_T] + positions_BK[sample_T, column_T]
    target_items = items[flat[places_T]]
    if not targets.together:
        masked[places_T] = FIRST_MASK_WORD + column_T
        one_each = np.arange(len(sample_T) + 1)
        return MaskedSamples(masked, offsets, sample_T, column_T, target_items, one_each)
    keep = np.ones(len(masked), bool)
    keep[places_T] = column_T == 0
    masked[places_T] = FIRST_MASK_WORD
    counts_B = (positions_BK >= 0).sum(axis=1)
    rows = np.arange(len(starts_B))
    return MaskedSamples(
        words=masked[keep],
        offsets=offsets_of(np.diff(offsets) - np.maximum(counts_B - 1, 0)),
        row_sample=rows,
        row_mask=np.zeros_like(rows),
        target_items=target_items,
        target_offsets=offsets_of(counts_B),
    )


def _prefix_rows(
    items: np.ndarray, segments: PrefixSegments, part_P: np.ndarray, layout: Layout
) -> MaskedSamples:
    """The decoder rows of some segments, each after a prefix of its own."""
    starts_P = segments.starts_P[part_P]
    flat, offsets = ragged(starts_P, segments.ends_P[part_P] - starts_P)
    num_rows_P = np.diff(segments.row_offsets_P)[part_P]
    rows_R = flat_ranges(segments.row_offsets_P[part_P], num_rows_P)
    return MaskedSamples(
        words=layout.words.item_words(items[flat]),
        offsets=offsets,
        row_sample=np.repeat(np.arange(len(part_P)), num_rows_P),
        row_mask=np.zeros(len(rows_R), np.int64),
        target_items=items[segments.targets_R[rows_R]],
        target_offsets=np.arange(len(rows_R) + 1),
        visible_R=segments.visible_R[rows_R],
        counted_B=segments.first_P[part_P],
        learned_R=segments.learned_R[rows_R],
    )


@dataclass(frozen=True)
class DecoderRows:
    """Each row is its items' tokens and </s>, after the rest of a prompt where there is one."""

    labels_RT: np.ndarray
    """int64 [R, T], IGNORED on padding and on forced tokens."""
    input_ids_RT: np.ndarray
    """int64 [R, T], the same one place later, after the mask to fill."""
    lengths_R: np.ndarray
    """int64 [R], tokens up to the last label."""

    def after(self, lead: np.ndarray) -> DecoderRows:
        """The rows after these tokens, which are no labels."""
        if not len(lead):
            return self
        shape = (len(self.lengths_R), len(lead))
        return DecoderRows(
            labels_RT=np.concatenate([np.full(shape, IGNORED), self.labels_RT], 1),
            input_ids_RT=np.concatenate([np.broadcast_to(lead, shape), self.input_ids_RT], 1),
            lengths_R=self.lengths_R + len(lead),
        )


def collate(
    masked: MaskedSamples,
    user_rows_B: np.ndarray,
    is_padding_B: np.ndarray,
    layout: Layout,
    options: BatchOptions,
) -> Batch:
    """The tensors of one micro-batch. Padding samples are passed through the layers, and have no
    labels."""
    sequences = encode_words(masked.words, masked.offsets, user_rows_B, layout)
    rows = _decoder_rows(masked, layout)
    lengths_B, lengths_R = sequences.lengths_B, rows.lengths_R
    ignored_R = masked.ignored_R(is_padding_B)
    rows.labels_RT[ignored_R] = IGNORED

    item_targets = None
    if options.item_targets:
        if masked.visible_R is not None:  # a causal encoder: the last token that the row reads
            every_B = np.arange(len(lengths_B)) * sequences.longest
            first_B = offsets_of(lengths_B)[:-1] if options.packed else every_B
            places_R = first_B[masked.row_sample] + masked.visible_R - 1
        else:
            assert len(sequences.masks) == len(masked.row_sample), "a mask was cut off"
            places_R = sequences.masks if options.packed else sequences.padded_masks
        items_R = masked.target_items[masked.target_offsets[:-1]].astype(np.int64)
        items_R[ignored_R] = IGNORED
        learned = np.flatnonzero(items_R != IGNORED)
        item_targets = ItemTargets(*map(torch.from_numpy, (places_R, items_R, learned)))

    if options.packed:
        inputs = _packed(sequences, rows, masked, layout, item_targets)
    else:
        visible_R = masked.visible_R
        inputs = ModelInputs(
            encoder=sequences.padded(layout.pad_token),
            encoder_row=torch.from_numpy(masked.row_sample),
            decoder_input_ids=torch.from_numpy(rows.input_ids_RT),
            labels=torch.from_numpy(rows.labels_RT),
            learned=_learned(rows.labels_RT),
            item_targets=item_targets,
            visible=None if visible_R is None else torch.from_numpy(visible_R),
            rows=None if visible_R is None else SampleRows.of(masked.row_sample),
        )
    # What the samples that count add up to.
    counted_B, counted_R = lengths_B[~is_padding_B], lengths_R[~ignored_R]
    read_R = lengths_B[masked.row_sample] if masked.visible_R is None else masked.visible_R
    pairs_B = counted_B * (counted_B + 1) // 2 if layout.causal else counted_B**2
    is_sample_B = ~is_padding_B if masked.counted_B is None else masked.counted_B & ~is_padding_B
    num_labels = int((rows.labels_RT != IGNORED).sum())
    work = Work(
        inputs=int(counted_B.sum()),
        targets=int(counted_R.sum()),
        labels=num_labels,
        encoder_pairs=int(pairs_B.sum()),
        decoder_pairs=int((counted_R**2).sum()),
        cross_pairs=int((counted_R * read_R[~ignored_R]).sum()),
    )
    return Batch(
        **vars(inputs),
        num_samples=int(is_sample_B.sum()),
        num_target_tokens=num_labels,
        num_targets=int((~ignored_R).sum()),
        num_tokens=work.inputs + work.targets,
        num_slots=inputs.encoder.input_ids.numel() + inputs.labels.numel(),
        work=work,
    )


def target_batch(encoder: EncoderInput, target_items_B: np.ndarray, layout: Layout) -> Batch:
    """The padded batch in which each encoded history has one target: for a validation loss.

    Args:
        encoder: of `encode_histories`.
        target_items_B: int32 [B], item rows.
        layout: as of the histories.
    """
    rows_B = np.arange(len(target_items_B))
    masked = MaskedSamples(
        words=np.empty(0, np.int64),
        offsets=np.zeros(1, np.int64),
        row_sample=rows_B,
        row_mask=np.zeros_like(rows_B),
        target_items=target_items_B,
        target_offsets=np.arange(len(rows_B) + 1),
    )
    rows = _decoder_rows(masked, layout)
    return Batch(
        encoder=encoder,
        encoder_row=torch.from_numpy(rows_B),
        decoder_input_ids=torch.from_numpy(rows.input_ids_RT),
        labels=torch.from_numpy(rows.labels_RT),
        learned=_learned(rows.labels_RT),
        num_samples=len(rows_B),
        num_target_tokens=int((rows.labels_RT != IGNORED).sum()),
        num_targets=len(rows_B),
        num_tokens=int(encoder.attention_mask.sum()) + int(rows.lengths_R.sum()),
        num_slots=encoder.input_ids.numel() + rows.labels_RT.size,
    )


def _packed(
    sequences: FlatSequences,
    rows: DecoderRows,
    masked: MaskedSamples,
    layout: Layout,
    item_targets: ItemTargets | None,
) -> ModelInputs:
    """Packed inputs. A last sample of padding without a label fills them up to one of few numbers
    of tokens."""
    # Three users whose rows have 2, 1 and 3 tokens, one row each; 2 tokens of padding for example:
    #   labels_RT = [[a /] [b -] [c d /]] without padding is [a / b c d /], then [- -]
    #   rows.offsets = [0 2 3 6 8], positions_m = [0 1 0 0 1 2 0 0]
    # The padding's row attends to the padding sequence, the last of the encoder's.
    sequences = sequences.with_padding_sequence(layout.pad_token)
    lengths_R = rows.lengths_R
    missing = filled_size(int(lengths_R.sum())) - int(lengths_R.sum())
    real_RT = np.arange(rows.labels_RT.shape[1]) < lengths_R[:, None]
    by_row = segments_of(np.append(lengths_R, missing))
    sample_of_row = np.append(masked.row_sample, len(sequences.lengths_B) - 1)
    targets_B = np.bincount(sample_of_row, by_row.lengths, len(sequences.lengths_B))
    visible_m = None
    if masked.visible_R is not None:
        visible_m = np.repeat(np.append(masked.visible_R, sequences.lengths_B[-1]), by_row.lengths)
    packing = Packing(
        encoder=segments_of(sequences.lengths_B),
        targets=segments_of(targets_B.astype(np.int64)),
        rows=by_row,
        positions_m=torch.from_numpy(np.append(real_RT.nonzero()[1], np.zeros(missing, np.int64))),
        causal=layout.causal,
        visible_m=visible_m,
    )
    input_ids_m = np.append(rows.input_ids_RT[real_RT], np.full(missing, layout.pad_token))
    labels_m = np.append(rows.labels_RT[real_RT], np.full(missing, IGNORED))
    return ModelInputs(
        encoder=sequences.packed(),
        encoder_row=torch.from_numpy(masked.row_sample),
        decoder_input_ids=torch.from_numpy(input_ids_m),
        labels=torch.from_numpy(labels_m),
        learned=_learned(labels_m),
        item_targets=item_targets,
        packing=packing,
    )


def _learned(labels: np.ndarray) -> torch.Tensor:
    """`ModelInputs.learned` of these labels."""
    return torch.from_numpy(np.flatnonzero(labels != IGNORED))


def _decoder_rows(masked: MaskedSamples, layout: Layout) -> DecoderRows:
    """The decoder rows of samples. Forced tokens are no labels, and rows end with their last
    label."""
    words = layout.words
    item_words = words.item_words(masked.target_items)
    flat, token_offsets = ragged(words.offsets[item_words], words.lengths[item_words])
    lengths_R = np.diff(token_offsets[masked.target_offsets])
    columns, last = np.arange(lengths_R.max(initial=0) + 1), (np.arange(len(lengths_R)), lengths_R)
    labels_RT = np.full((len(lengths_R), len(columns)), IGNORED, np.int64)
    labels_RT[columns < lengths_R[:, None]] = words.tokens[flat]
    labels_RT[last] = words.tokens[words.offsets[EOS_WORD]]
    input_ids_RT = np.empty_like(labels_RT)
    input_ids_RT[:, 0] = words.tokens[words.offsets[FIRST_MASK_WORD + masked.row_mask + 1] - 1]
    before_RT = labels_RT[:, :-1]
    input_ids_RT[:, 1:] = np.where(before_RT == IGNORED, layout.pad_token, before_RT)
    if layout.forced is None:
        return DecoderRows(labels_RT, input_ids_RT, lengths_R + 1).after(layout.lead)
    assert len(masked.target_items) == len(lengths_R), "several items in one answer have no trie"
    forced_RT = np.ones(labels_RT.shape, bool)
    forced_RT[columns < lengths_R[:, None]] = layout.forced.tokens[flat]
    forced_RT[last] = layout.forced.ends[item_words]
    labels_RT[forced_RT] = IGNORED
    lengths_R = len(columns) - np.argmin(forced_RT[:, ::-1], axis=1)
    input_ids_RT[columns >= lengths_R[:, None]] = layout.pad_token
    longest = int(lengths_R.max(initial=0))
    rows = DecoderRows(labels_RT[:, :longest], input_ids_RT[:, :longest], lengths_R)
    return rows.after(layout.lead)
