"""What each encoder row shows and each decoder row generates, before there are tokens."""

# B samples, b samples of a micro-batch, K targets of a sample, T targets, R decoder rows, L input
# tokens; packed: n input tokens, m target tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from genrec_shards.sequences import flat_ranges, offsets_of

from genrec_dist.data.encoder_input import ragged
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.masking import Targets
from genrec_dist.data.samples.prefix_samples import PrefixSegments
from genrec_dist.data.word_table import FIRST_MASK_WORD, WordTable


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
    places_R: np.ndarray | None = None
    """int64 [R], of prefixes: index of each target among the items of the step."""

    def ignored_R(self, is_padding_B: np.ndarray) -> np.ndarray:
        """bool [R], decoder rows that are not in the loss."""
        of_padding_R: np.ndarray = is_padding_B[self.row_sample]
        return of_padding_R if self.learned_R is None else of_padding_R | ~self.learned_R


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


def prefix_rows(
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
        places_R=segments.targets_R[rows_R],
    )
