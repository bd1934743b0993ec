"""A rank's samples of a step as micro-batches: choose targets, split by length, collate."""

# B samples, b samples of a micro-batch, K targets of a sample, T targets, R decoder rows, L input
# tokens; packed: n input tokens, m target tokens

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
from genrec_shards.keyed_random import keyed_bits, keyed_uniform
from genrec_shards.sequences import offsets_of
from genrec_shards.storage.sample_order import StepSamples

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import RankStep
from genrec_dist.data.collate import WORTH_A_BATCH, BatchOptions, collate
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.masked_samples import apply_mask, prefix_rows
from genrec_dist.data.samples.masking import STRATEGIES, Targets
from genrec_dist.data.samples.prefix_samples import prefix_segments


class SequenceSource(Protocol):
    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(items int32 [total], offsets int64 [B + 1]) of these users' whole sequences."""


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
    split = split_packed
    if not options.packed:
        split = partial(split_padded, most_padding=options.most_padding)
    for part in split(tokens, options.micro_batch_tokens):
        if segments is not None:
            masked, samples_b = prefix_rows(items, segments, part, layout), segments.sample_P[part]
        else:
            of_part = Targets(targets.positions_BK[part], targets.together)
            masked = apply_mask(items, starts_B[part], ends_B[part], of_part, layout.words)
            samples_b = part
        user_rows_b, is_padding_b = samples.user_rows[samples_b], samples.is_padding[samples_b]
        teacher = options.teacher
        if teacher is None or masked.places_R is None:
            batches.append(collate(masked, user_rows_b, is_padding_b, layout, options))
            continue
        learned = ~masked.ignored_R(is_padding_b)
        row_b = masked.row_sample[learned]
        places = masked.places_R[learned] - starts_B[samples_b[row_b]]
        if layout.nodes is None:  # each row has one label
            soft = teacher.soft_targets(user_rows_b[row_b], places, layout.words)
        else:
            prefixes = teacher.prefixes(user_rows_b[row_b], places)
            true, target_items = masked.target_items[learned], masked.target_items.copy()
            drawn = teacher.draw_items(prefixes, true, options.seed, epoch)
            target_items[learned] = drawn
            masked = replace(masked, target_items=target_items)
            soft = teacher.soft_siblings(prefixes, true, drawn, layout)
        batch = collate(masked, user_rows_b, is_padding_b, layout, options)
        batches.append(replace(batch, soft=soft))
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


def split_padded(
    tokens_B: np.ndarray, micro_batch_tokens: int, most_padding: int = WORTH_A_BATCH
) -> list[np.ndarray]:
    """Indices of samples by micro-batch, longest first. One ends where its padded rectangle would
    exceed the budget, or where its padding would cost more than another micro-batch."""
    order = np.argsort(-tokens_B, kind="stable")
    lengths = tokens_B[order]
    parts, start = [], 0
    while start < len(order):
        longest = int(lengths[start])
        fitting = lengths[start : start + max(1, micro_batch_tokens // longest)]
        padding = np.cumsum(longest - fitting)
        size = max(1, int(np.searchsorted(padding, most_padding, side="right")))
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
