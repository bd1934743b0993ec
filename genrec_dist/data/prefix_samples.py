"""Prefixes of sequences as samples: which segments are encoded, and how much of its segment each
target reads."""

# B samples, T targets, P segments, R decoder rows

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from genrec_shards.sequences import flat_ranges, offsets_of

from genrec_dist.data.encoder_input import Layout


@dataclass(frozen=True)
class PrefixSegments:
    """Segments that a causal encoder reads once, each for the targets after some of its
    prefixes."""

    sample_P: np.ndarray
    """int64 [P], ascending."""
    starts_P: np.ndarray
    """int64 [P], indices of items."""
    ends_P: np.ndarray
    tokens_P: np.ndarray
    """int64 [P], encoder tokens, <s> and user included."""
    row_offsets_P: np.ndarray
    """int64 [P + 1], first decoder row of each."""
    targets_R: np.ndarray
    """int64 [R], indices of items."""
    visible_R: np.ndarray
    """int64 [R], tokens of its segment that a row reads, from the first on."""
    learned_R: np.ndarray
    """bool [R], rows that have a target. A sequence of one item has none; its row passes through
    the layers unused."""

    @property
    def first_P(self) -> np.ndarray:
        """bool [P], whether a segment is its sample's first."""
        return np.diff(self.sample_P, prepend=-1) > 0


def prefix_segments(
    items: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    user_rows_B: np.ndarray,
    layout: Layout,
    all_prefixes: bool,
) -> PrefixSegments:
    """The segments of sequences, whose targets are their last items or, with `all_prefixes`, all
    items but the first.

    A target reads what a sample of its own would hold: the longest suffix of its history that
    fits. Targets share a segment as long as the whole history fits; each later one has its own.

    Args:
        items: int32 [total], item rows.
        starts_B: int64 [B], index of each sequence's first item.
        ends_B: int64 [B], exclusive.
        user_rows_B: int64 [B].
        layout: of the encoder, which is causal.
        all_prefixes: whether each item after the first is a target.
    """
    num_samples = len(starts_B)
    before = offsets_of(layout.lengths[layout.words.item_words(items)])
    head_B = np.ones(num_samples, np.int64)
    if layout.user_ids:
        head_B += layout.lengths[layout.words.user_words(user_rows_B)]
    room_B = layout.max_tokens - head_B
    if not all_prefixes:
        targets_B = ends_B - 1
        first_B = np.maximum(starts_B, np.searchsorted(before, before[targets_B] - room_B))
        tokens_B = head_B + before[targets_B] - before[first_B]
        return PrefixSegments(
            sample_P=np.arange(num_samples),
            starts_P=first_B,
            ends_P=targets_B,
            tokens_P=tokens_B,
            row_offsets_P=np.arange(num_samples + 1),
            targets_R=targets_B,
            visible_R=tokens_B,
            learned_R=np.ones(num_samples, bool),
        )
    # Three users, four items, every word one token, room for <s>, the user and two items:
    #   items = [0 1 2 3 | 2 | 3 0], starts_B = [0 4 5], ends_B = [4 5 7]
    #   targets_T = [1 2 3 | | 6], fits_T = [yes yes no | | yes], shared_B = [2 0 1]
    # The whole history of target 3 does not fit, so it has a segment of its own, from 1 on:
    #   sample_P = [0 0 1 2], starts_P = [0 1 4 5], ends_P = [2 3 5 6]
    #   targets_R = [1 2 | 3 | 4 | 6], visible_R = [3 4 | 4 | 2 | 3], all learned but the fourth
    targets_T = flat_ranges(starts_B + 1, ends_B - starts_B - 1)
    sample_T = np.repeat(np.arange(num_samples), ends_B - starts_B - 1)
    fits_T = before[targets_T] - before[starts_B[sample_T]] <= room_B[sample_T]
    shared_B = np.bincount(sample_T[fits_T], minlength=num_samples)
    alone_T, sample_of_alone_T = targets_T[~fits_T], sample_T[~fits_T]
    first_alone_T = np.searchsorted(before, before[alone_T] - room_B[sample_of_alone_T])

    sample_P = np.concatenate([np.arange(num_samples), sample_of_alone_T])
    order = np.argsort(sample_P, kind="stable")
    sample_P = sample_P[order]
    starts_P = np.concatenate([starts_B, first_alone_T])[order]
    ends_P = np.concatenate([starts_B + np.maximum(shared_B, 1), alone_T])[order]
    rows_P = np.concatenate([np.maximum(shared_B, 1), np.ones_like(alone_T)])[order]
    # The row of a sequence of one item takes that item, before which it sees none.
    first_B = np.where(shared_B > 0, starts_B + 1, starts_B)
    targets_R = flat_ranges(np.concatenate([first_B, alone_T])[order], rows_P)
    segment_R = np.repeat(np.arange(len(rows_P)), rows_P)
    head_P = head_B[sample_P]
    return PrefixSegments(
        sample_P=sample_P,
        starts_P=starts_P,
        ends_P=ends_P,
        tokens_P=head_P + before[ends_P] - before[starts_P],
        row_offsets_P=offsets_of(rows_P),
        targets_R=targets_R,
        visible_R=head_P[segment_R] + before[targets_R] - before[starts_P[segment_R]],
        learned_R=targets_R > starts_P[segment_R],
    )
