"""Prefixes of sequences as samples: which stretches are encoded, and which targets read how much of
each."""

# B samples, P stretches, R decoder rows

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genrec_dist.data.encoder_input import Layout, offsets_of, ragged


@dataclass(frozen=True)
class Stretches:
    """What a causal encoder goes over once, each for the targets behind some of its prefixes."""

    sample_P: np.ndarray
    """int64 [P], ascending."""
    starts_P: np.ndarray
    """int64 [P], places among the items."""
    ends_P: np.ndarray
    tokens_P: np.ndarray
    """int64 [P], encoder tokens, <s> and user included."""
    row_offsets_P: np.ndarray
    """int64 [P + 1], decoder rows of each."""
    targets_R: np.ndarray
    """int64 [R], places among the items."""
    visible_R: np.ndarray
    """int64 [R], tokens of its stretch that the row reads."""
    learned_R: np.ndarray
    """bool [R], rows that have a target: a sequence of one item has none, and its row goes through
    the layers for nothing."""

    @property
    def first_P(self) -> np.ndarray:
        """bool [P], the first one of its sample."""
        return np.diff(self.sample_P, prepend=-1) > 0


def cut_prefixes(
    items: np.ndarray,
    starts_B: np.ndarray,
    ends_B: np.ndarray,
    user_rows_B: np.ndarray,
    layout: Layout,
    every: bool,
) -> Stretches:
    """Stretches of the sequences [start, end): the last item of each is its target, or, with
    `every`, each but the first.

    A target reads what a sample of its own would be given: the longest suffix of its history that
    fits. As long as the whole history fits, targets share a stretch; each one beyond has one to
    itself."""
    before = offsets_of(layout.lengths[layout.words.item_words(items)])
    head_B = np.ones(len(starts_B), np.int64)
    if layout.user_ids:
        head_B += layout.lengths[layout.words.user_words(user_rows_B)]
    room_B = layout.max_tokens - head_B
    if not every:
        targets_B = ends_B - 1
        first_B = np.maximum(starts_B, np.searchsorted(before, before[targets_B] - room_B))
        tokens_B = head_B + before[targets_B] - before[first_B]
        rows_B = np.arange(len(starts_B))
        return Stretches(
            rows_B, first_B, targets_B, tokens_B, np.arange(len(starts_B) + 1), targets_B, tokens_B, np.ones(len(starts_B), bool)
        )  # fmt: skip
    targets_T, _ = ragged(starts_B + 1, ends_B - starts_B - 1)
    sample_T = np.repeat(np.arange(len(starts_B)), ends_B - starts_B - 1)
    fits_T = before[targets_T] - before[starts_B[sample_T]] <= room_B[sample_T]
    shared_B = np.bincount(sample_T[fits_T], minlength=len(starts_B))
    alone_T, of_alone_T = targets_T[~fits_T], sample_T[~fits_T]
    first_alone_T = np.searchsorted(before, before[alone_T] - room_B[of_alone_T])

    sample_P = np.concatenate([np.arange(len(starts_B)), of_alone_T])
    order = np.argsort(sample_P, kind="stable")
    sample_P = sample_P[order]
    starts_P = np.concatenate([starts_B, first_alone_T])[order]
    ends_P = np.concatenate([starts_B + np.maximum(shared_B, 1), alone_T])[order]
    rows_P = np.concatenate([np.maximum(shared_B, 1), np.ones_like(alone_T)])[order]
    # The row of a sequence of one item stands for that item itself, before which it sees none.
    first_targets_P = np.concatenate([np.where(shared_B > 0, starts_B + 1, starts_B), alone_T])[
        order
    ]
    targets_R, row_offsets_P = ragged(first_targets_P, rows_P)
    stretch_R = np.repeat(np.arange(len(rows_P)), rows_P)
    head_P = head_B[sample_P]
    return Stretches(
        sample_P=sample_P,
        starts_P=starts_P,
        ends_P=ends_P,
        tokens_P=head_P + before[ends_P] - before[starts_P],
        row_offsets_P=row_offsets_P,
        targets_R=targets_R,
        visible_R=head_P[stretch_R] + before[targets_R] - before[starts_P[stretch_R]],
        learned_R=targets_R > starts_P[stretch_R],
    )
