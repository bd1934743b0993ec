"""Prefixes of sequences as samples: which segments are encoded, and how much of its segment each
target reads."""

# B samples, T targets, P segments, R decoder rows

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from genrec_shards.sequences import flat_ranges, offsets_of

from genrec_dist.data.layout import Layout


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
    *,
    share_windows: bool = False,
) -> PrefixSegments:
    """The segments of sequences, whose targets are their last items or, with `all_prefixes`, all
    items but the first.

    A target reads what a sample of its own would hold: the longest suffix of its history that
    fits. Targets share a segment as long as the whole history fits; each later one has its own,
    or shares a window that begins every half of the room.

    Args:
        items: int32 [total], item rows.
        starts_B: int64 [B], index of each sequence's first item.
        ends_B: int64 [B], exclusive.
        user_rows_B: int64 [B].
        layout: of the encoder, which is causal.
        all_prefixes: whether each item after the first is a target.
        share_windows: a target whose history does not fit reads between half of what fits and all
            of it. A history of n items then costs about 2n encoder tokens, where windows of its
            own for each target cost n times `layout.max_tokens`.
    """
    num_samples = len(starts_B)
    before = offsets_of(layout.lengths[layout.words.item_words(items)])
    head_B = np.full(num_samples, layout.head_length)
    if layout.user_ids:
        head_B += layout.lengths[layout.words.user_words(user_rows_B)]
    room_B = layout.max_tokens - head_B
    if not all_prefixes:
        targets_B = ends_B - 1
        first_B = np.maximum(starts_B, np.searchsorted(before, before[targets_B] - room_B))
        first_B = np.maximum(first_B, targets_B - layout.max_items)
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
    fits_T &= targets_T - starts_B[sample_T] <= layout.max_items
    shared_B = np.bincount(sample_T[fits_T], minlength=num_samples)
    alone_T, sample_of_alone_T = targets_T[~fits_T], sample_T[~fits_T]
    first_W, sample_W, rows_W = _windows(
        before, alone_T, sample_of_alone_T, starts_B, room_B, layout, share_windows
    )
    begin_W = offsets_of(rows_W)[:-1]  # each window's first target, an index of alone_T

    sample_P = np.concatenate([np.arange(num_samples), sample_W])
    order = np.argsort(sample_P, kind="stable")
    sample_P = sample_P[order]
    starts_P = np.concatenate([starts_B, first_W])[order]
    last_W = alone_T[begin_W + rows_W - 1]
    ends_P = np.concatenate([starts_B + np.maximum(shared_B, 1), last_W])[order]
    rows_P = np.concatenate([np.maximum(shared_B, 1), rows_W])[order]
    # The row of a sequence of one item takes that item, before which it sees none.
    first_B = np.where(shared_B > 0, starts_B + 1, starts_B)
    targets_R = flat_ranges(np.concatenate([first_B, alone_T[begin_W]])[order], rows_P)
    segment_R = np.repeat(np.arange(len(rows_P)), rows_P)
    head_P = head_B[sample_P]
    visible_R = head_P[segment_R] + before[targets_R] - before[starts_P[segment_R]]
    return PrefixSegments(
        sample_P=sample_P,
        starts_P=starts_P,
        ends_P=ends_P,
        tokens_P=head_P + before[ends_P] - before[starts_P],
        row_offsets_P=offsets_of(rows_P),
        targets_R=targets_R,
        # A row without a target sees something, too: a softmax over nothing is no number.
        visible_R=np.maximum(visible_R, 1),
        learned_R=targets_R > starts_P[segment_R],
    )


def _windows(
    before: np.ndarray,
    targets_T: np.ndarray,
    sample_T: np.ndarray,
    starts_B: np.ndarray,
    room_B: np.ndarray,
    layout: Layout,
    share: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first item, sample, number of targets), int64 [W] each, of the windows in which the targets
    are read whose history does not fit; targets are ascending."""
    half_T = room_B[sample_T] // 2
    # An item counts as at least its share of the room, so that no window has too many.
    least = -(-int(room_B.max(initial=1)) // layout.max_items)
    longest = max(layout.longest_item, least)
    if not share or half_T.min(initial=longest) < longest:
        first_T = np.searchsorted(before, before[targets_T] - room_B[sample_T])
        first_T = np.maximum(first_T, targets_T - layout.max_items)
        return first_T, sample_T, np.ones_like(targets_T)
    # One user of ten items, every word one token, room for four items: targets 1..4 fit, and
    #   targets_T = [5 6 7 8 9], their excess [1 2 3 4 5] tokens, number_T = [1 1 2 2 3]
    # Window k begins k halves after the sequence does, so that its last target fills the room:
    #   windows from items 2, 4 and 6, with targets 5 and 6 (3 and 4 items visible), 7 and 8, 9
    before = offsets_of(np.maximum(np.diff(before), least))
    excess_T = before[targets_T] - before[starts_B[sample_T]] - room_B[sample_T]
    number_T = -(-excess_T // half_T)
    is_new_T = (np.diff(sample_T, prepend=-1) != 0) | (np.diff(number_T, prepend=0) != 0)
    begin_W = np.flatnonzero(is_new_T)
    sample_W = sample_T[begin_W]
    first_W = np.searchsorted(before, before[starts_B[sample_W]] + (number_T * half_T)[begin_W])
    return first_W, sample_W, np.diff(begin_W, append=len(targets_T))
