"""From samples to the tensors of one step: mask, cut into micro-batches, gather tokens, pad or
pack."""

# B samples, R decoder rows, L input tokens, T target tokens; packed: n input tokens, m target
# tokens

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Protocol, TypedDict

import numpy as np
import torch
from genrec_shards.keyed_random import keyed_bits, keyed_uniform
from genrec_shards.storage.sample_order import StepSamples

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import IGNORED, ItemTargets, Batch, RankStep, Work
from genrec_dist.data.encoder_input import EncoderInput, Layout, Text, offsets_of, ragged, write
from genrec_dist.data.masking import STRATEGIES, Targets
from genrec_dist.data.packing import Packing, filled_size, spans_of
from genrec_dist.data.prefix_samples import Stretches, cut_prefixes
from genrec_dist.data.word_table import EOS_WORD, FIRST_MASK_WORD, WordTable

WORTH_A_CUT = 4096
"""Padding tokens that cost more than one more micro-batch (two CPU cores, width 128: docs/log.md,
2026-11-21)."""


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
    visible_R: np.ndarray | None = None
    """int64 [R], encoder tokens of its row's that each decoder row may look at, the first so many;
    None: all."""
    counted_B: np.ndarray | None = None
    """bool [B], encoder rows that count as a sample; None: all."""
    learned_R: np.ndarray | None = None
    """bool [R], decoder rows that are in the loss; None: all."""

    def silent_R(self, is_padding_B: np.ndarray) -> np.ndarray:
        """bool [R], decoder rows that are not in the loss."""
        silent_R: np.ndarray = is_padding_B[self.row_sample]
        return silent_R if self.learned_R is None else silent_R | ~self.learned_R


def make_step(
    samples: StepSamples,
    source: SequenceSource,
    layout: Layout,
    *,
    mask: Mask | None,
    seed: int,
    epoch: int,
    micro_batch_tokens: int,
    packed: bool = False,
    item_targets: bool = False,
    all_prefixes: bool = False,
) -> RankStep:
    """A rank's samples of a step as micro-batches of samples of like length (the sum over a step
    has no order).

    `mask` is the strategy, or None for [MASK] after the history. A micro-batch holds at most
    `micro_batch_tokens` encoder tokens, padding included (one sample at least); `packed`: there is
    none. `item_targets`: for a model with an item head. `all_prefixes`: each item of a sample's
    training part but the first is a target (causal encoders)."""
    items, offsets = source.gather(samples.user_rows)
    starts_B = offsets[:-1]
    if layout.causal:
        last_B = samples.training_lengths - 1 if all_prefixes else samples.target_positions
        targets = Targets(last_B.astype(np.int64)[:, None], together=False)
        stretches = cut_prefixes(
            items, starts_B, starts_B + last_B + 1, samples.user_rows, layout, all_prefixes
        )
        batches = [
            collate(
                prefix_rows(items, stretches, part, layout),
                samples.user_rows[stretches.sample_P[part]],
                samples.is_padding[stretches.sample_P[part]],
                layout,
                packed,
                item_targets,
            )
            for part in (cut_packed if packed else cut)(stretches.tokens_P, micro_batch_tokens)
        ]
        return _rank_step(batches, samples, targets)
    if mask is None:
        # The target of a finetuning sample stands behind its history: it is read, then shown as
        # [MASK].
        ends_B = starts_B + samples.target_positions + 1
        targets = Targets(samples.target_positions.astype(np.int64)[:, None], together=False)
    else:
        ends_B = starts_B + samples.training_lengths
        targets = choose_targets(samples, layout, mask, seed, epoch)
    tokens_B = _token_lengths(items, starts_B, ends_B, samples.user_rows, targets, layout)
    batches = []
    for part in (cut_packed if packed else cut)(tokens_B, micro_batch_tokens):
        positions_bK = targets.positions_BK[part]
        masked = apply_mask(
            items, starts_B[part], ends_B[part], positions_bK, targets.together, layout.words
        )
        batches.append(
            collate(
                masked, samples.user_rows[part], samples.is_padding[part], layout, packed, item_targets
            )
        )
    return _rank_step(batches, samples, targets)


def _rank_step(batches: list[Batch], samples: StepSamples, targets: Targets) -> RankStep:
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

    A target counts as its mask: were it counted as itself, its length would choose the samples it
    is padded beside."""
    words = layout.words
    item_tokens = layout.lengths[words.item_words(items)]
    before = offsets_of(item_tokens)
    user_tokens_B = layout.lengths[words.user_words(user_rows_B)] if layout.user_ids else 0
    sample_T, column_T = np.nonzero(targets.positions_BK >= 0)
    target_tokens_T = item_tokens[starts_B[sample_T] + targets.positions_BK[sample_T, column_T]]
    mask_tokens_T = (column_T == 0) | (not targets.together)
    hidden_B = np.bincount(sample_T, target_tokens_T - mask_tokens_T, len(starts_B)).astype(
        np.int64
    )
    return np.minimum(
        before[ends_B] - before[starts_B] - hidden_B + user_tokens_B + 2, layout.max_tokens
    )


def cut(tokens_B: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Samples by descending length as [indices, ...]: cut where the padded rectangle would exceed
    the budget, or where its padding would cost more than another micro-batch does."""
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


def cut_packed(tokens_B: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """The same without padding: as few parts as the budget allows, of nearly equal numbers of
    tokens."""
    order = np.argsort(-tokens_B, kind="stable")
    ends = np.cumsum(tokens_B[order])
    parts = 1
    while True:
        firsts = np.searchsorted(ends, np.arange(1, parts) * (int(ends[-1]) / parts), side="left")
        cuts = np.unique(np.concatenate([[0], firsts, [len(order)]]))
        sizes = np.diff(np.concatenate([[0], ends])[cuts])
        if np.all((sizes <= micro_batch_tokens) | (np.diff(cuts) == 1)):
            return [order[first:last] for first, last in pairwise(cuts)]
        parts += 1


def choose_targets(
    samples: StepSamples, layout: Layout, mask: Mask, seed: int, epoch: int
) -> Targets:
    """Targets inside the training parts, among the most recent items that are sure to fit."""
    lengths_B = samples.training_lengths.astype(np.int64)
    allowed_B = np.minimum(lengths_B, layout.sure_items)
    chosen = STRATEGIES[mask.strategy](
        allowed_B, partial(keyed_uniform, seed, epoch, samples.sample_ids), mask
    )
    shift_B1 = (lengths_B - allowed_B)[:, None]
    return Targets(
        np.where(chosen.positions_BK < 0, -1, chosen.positions_BK + shift_B1), chosen.together
    )


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
    return MaskedSamples(
        inner[keep],
        offsets_of(kept_B),
        rows,
        np.zeros_like(rows),
        target_items,
        offsets_of(counts_B),
    )


def prefix_rows(
    items: np.ndarray, stretches: Stretches, part_P: np.ndarray, layout: Layout
) -> MaskedSamples:
    """The decoder rows of these stretches, each behind a prefix of its own."""
    starts_P = stretches.starts_P[part_P]
    flat, offsets = ragged(starts_P, stretches.ends_P[part_P] - starts_P)
    num_rows_P = np.diff(stretches.row_offsets_P)[part_P]
    rows_R, _ = ragged(stretches.row_offsets_P[part_P], num_rows_P)
    return MaskedSamples(
        words=layout.words.item_words(items[flat]),
        offsets=offsets,
        row_sample=np.repeat(np.arange(len(part_P)), num_rows_P),
        row_mask=np.zeros(len(rows_R), np.int64),
        target_items=items[stretches.targets_R[rows_R]],
        target_offsets=np.arange(len(rows_R) + 1),
        visible_R=stretches.visible_R[rows_R],
        counted_B=stretches.first_P[part_P],
        learned_R=stretches.learned_R[rows_R],
    )


def collate(
    masked: MaskedSamples,
    user_rows_B: np.ndarray,
    is_padding_B: np.ndarray,
    layout: Layout,
    packed: bool = False,
    item_targets: bool = False,
) -> Batch:
    """Gather tokens and pad, or pack. Padding samples keep their place and lose their labels."""
    text = write(masked.words, masked.offsets, user_rows_B, layout)
    batch = _with_targets(text, masked, is_padding_B, layout, packed)
    if not item_targets:
        return batch
    if layout.causal:
        # The last token that the row reads.
        assert masked.visible_R is not None
        first_B = (
            offsets_of(text.lengths_B)[:-1]
            if packed
            else np.arange(len(text.lengths_B)) * text.longest
        )
        places_R = first_B[masked.row_sample] + masked.visible_R - 1
    else:
        assert len(text.masks) == len(masked.row_sample), "a mask was cut off"
        places_R = text.masks if packed else text.padded_masks
    items_R = masked.target_items[masked.target_offsets[:-1]].astype(np.int64)
    items_R[masked.silent_R(is_padding_B)] = IGNORED
    return replace(batch, item_targets=ItemTargets(torch.from_numpy(places_R), torch.from_numpy(items_R)))


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
    labels_RT, decoder_RT, lengths_R = _decoder_rows(masked, layout)
    num_target_tokens = int((labels_RT != IGNORED).sum())
    return Batch(
        encoder=encoder,
        encoder_row=torch.from_numpy(rows_B),
        decoder_input_ids=torch.from_numpy(decoder_RT),
        labels=torch.from_numpy(labels_RT),
        num_samples=len(rows_B),
        num_target_tokens=num_target_tokens,
        num_targets=len(rows_B),
        num_tokens=int(encoder.attention_mask.sum()) + int(lengths_R.sum()),
        num_slots=encoder.input_ids.numel() + labels_RT.size,
    )


class Counts(TypedDict):
    num_samples: int
    num_target_tokens: int
    num_targets: int
    num_tokens: int
    work: Work


def _with_targets(
    text: Text, masked: MaskedSamples, is_padding_B: np.ndarray, layout: Layout, packed: bool
) -> Batch:
    labels_RT, decoder_RT, lengths_R = _decoder_rows(masked, layout)
    silent_R = masked.silent_R(is_padding_B)
    counted_B = ~is_padding_B if masked.counted_B is None else masked.counted_B & ~is_padding_B
    labels_RT[silent_R] = IGNORED
    num_target_tokens = int((labels_RT != IGNORED).sum())
    counts = Counts(
        num_samples=int(counted_B.sum()),
        num_target_tokens=num_target_tokens,
        num_targets=int((~silent_R).sum()),
        num_tokens=int(text.lengths_B[~is_padding_B].sum()) + int(lengths_R[~silent_R].sum()),
        work=_work(
            text.lengths_B, lengths_R, num_target_tokens, masked, is_padding_B, layout.causal
        ),
    )
    if packed:
        return _packed(text, labels_RT, decoder_RT, lengths_R, masked, counts, layout)
    encoder = text.padded(layout.pad_token)
    return Batch(
        encoder=encoder,
        encoder_row=torch.from_numpy(masked.row_sample),
        decoder_input_ids=torch.from_numpy(decoder_RT),
        labels=torch.from_numpy(labels_RT),
        num_slots=encoder.input_ids.numel() + labels_RT.size,
        visible=None if masked.visible_R is None else torch.from_numpy(masked.visible_R),
        **counts,
    )


def _work(
    lengths_B: np.ndarray,
    lengths_R: np.ndarray,
    num_labels: int,
    masked: MaskedSamples,
    is_padding_B: np.ndarray,
    causal: bool,
) -> Work:
    heard_R = ~masked.silent_R(is_padding_B)
    counted_B, counted_R = lengths_B[~is_padding_B], lengths_R[heard_R]
    visible_R = lengths_B[masked.row_sample] if masked.visible_R is None else masked.visible_R
    return Work(
        inputs=int(counted_B.sum()),
        targets=int(counted_R.sum()),
        labels=num_labels,
        encoder_pairs=int((counted_B * (counted_B + 1) // 2 if causal else counted_B**2).sum()),
        decoder_pairs=int((counted_R**2).sum()),
        cross_pairs=int((counted_R * visible_R[heard_R]).sum()),
    )


def _packed(
    text: Text,
    labels_RT: np.ndarray,
    decoder_RT: np.ndarray,
    lengths_R: np.ndarray,
    masked: MaskedSamples,
    counts: Counts,
    layout: Layout,
) -> Batch:
    """A packed micro-batch, filled up to one of few numbers of tokens by a last sample that teaches
    nothing."""
    row_sample_R, pad_token = masked.row_sample, layout.pad_token
    text = text.with_padding_sequence(pad_token)
    real_RT = np.arange(labels_RT.shape[1]) < lengths_R[:, None]
    missing = filled_size(int(lengths_R.sum())) - int(lengths_R.sum())
    rows = spans_of(np.append(lengths_R, missing))
    lengths_B = np.bincount(
        np.append(row_sample_R, len(text.lengths_B) - 1), rows.lengths, len(text.lengths_B)
    )
    positions_m = np.append(real_RT.nonzero()[1], np.zeros(missing, np.int64))
    labels_m = np.append(labels_RT[real_RT], np.full(missing, IGNORED))
    visible_m = None
    if masked.visible_R is not None:
        visible_m = np.repeat(np.append(masked.visible_R, text.lengths_B[-1]), rows.lengths)
    return Batch(
        encoder=text.packed(),
        encoder_row=torch.from_numpy(row_sample_R),
        decoder_input_ids=torch.from_numpy(
            np.append(decoder_RT[real_RT], np.full(missing, pad_token))
        ),
        labels=torch.from_numpy(labels_m),
        num_slots=len(text.tokens_n) + len(labels_m),
        packing=Packing(
            spans_of(text.lengths_B),
            spans_of(lengths_B.astype(np.int64)),
            rows,
            torch.from_numpy(positions_m),
            layout.causal,
            visible_m,
        ),
        **counts,
    )


def _decoder_rows(
    masked: MaskedSamples, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, decoder inputs, tokens a row), int64 [R, T] and [R]: items' tokens and `</s>`; the
    same behind the mask to fill. ForcedTokens tokens are no labels, and rows end with their last
    label."""
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
    if layout.forced is None:
        return labels_RT, decoder_RT, lengths_R + 1
    assert len(masked.target_items) == len(lengths_R), "several items in one answer have no trie"
    forced_RT = np.ones(labels_RT.shape, bool)
    forced_RT[columns < lengths_R[:, None]] = layout.forced.tokens[flat]
    forced_RT[np.arange(len(lengths_R)), lengths_R] = layout.forced.ends[item_words]
    labels_RT[forced_RT] = IGNORED
    lengths_R = len(columns) - np.argmin(forced_RT[:, ::-1], axis=1)
    decoder_RT[columns >= lengths_R[:, None]] = layout.pad_token
    longest = int(lengths_R.max(initial=0))
    return labels_RT[:, :longest], decoder_RT[:, :longest], lengths_R
