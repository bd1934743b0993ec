"""Packed arrays: sequences one after another without padding, and which tokens attend to which."""

# S sequences, B samples, R decoder rows, n encoder tokens, m decoder tokens, c sequences of a
# group, Q longest query sequence of it

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from genrec_shards.sequences import offsets_of
from torch import Tensor

WORTH_A_GROUP = 1024
"""Tokens from which sequences of one length are a rectangle of their own; fewer are padded to a
longer neighbour's length."""

SHORTEST_SHARE = 0.75
"""Share of a rectangle's length from which a shorter sequence is still padded to it."""


class GroupTokens(NamedTuple):
    """A group's queries or its keys: where they are in the packed array and in the rectangle."""

    first: int
    """Index of the first token."""
    number: int
    """Tokens."""
    longest: int
    """Length of the rectangle."""
    slots: Tensor | None
    """int64 [number], index of each token in the rectangle, [c x longest]; None: no padding."""


class Group(NamedTuple):
    """Neighbouring sequences whose attention is computed as one rectangle, on devices without a
    kernel for ragged sequences."""

    size: int
    """c, sequences."""
    queries: GroupTokens
    keys: GroupTokens
    visible_cQ: Tensor | None
    """int64 [c, Q], how many keys each query attends to, from the first on; None: all."""
    branch_cQ: Tensor | None = None
    """int64 [c, Q], as `Attended.branch`; -1 on padding."""


@dataclass(frozen=True)
class Segments:
    """Sequences one after another."""

    offsets: np.ndarray
    """int32 [S + 1], the first token of each, and the end."""
    cu_seqlens: Tensor
    """The same as a tensor where the tokens are, for a kernel that reads it there."""
    at_most: int | None = None
    """What a kernel is told of the longest one, whatever it is: of micro-batches of one size."""

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0)) if self.at_most is None else self.at_most


@dataclass(frozen=True)
class Marks:
    """Which sequence each token belongs to, where attention must have the same shapes in each
    micro-batch: it then goes by one mask over all pairs, not by rectangles."""

    queries: Tensor
    """int64 [n], of each query."""
    keys: Tensor
    """int64 [k], of each key."""
    visible: Tensor | None = None
    """int64 [n], as `Attended.visible`."""
    places: Tensor | None = None
    """int64 [k], place of each key in its sequence; there with `visible`."""

    def seen(self, causal: bool) -> Tensor:
        """bool [n, k], which keys each query attends to."""
        seen_nk = self.queries[:, None] == self.keys
        if causal:  # queries and keys are the same tokens
            seen_nk = seen_nk.tril()
        if self.visible is not None and self.places is not None:
            seen_nk = seen_nk & (self.places < self.visible[:, None])
        return seen_nk


@dataclass(frozen=True)
class FixedMarks:
    """What the marks of a packing's three attentions are made of."""

    sample_n: Tensor
    """int64 [n], sample of each encoder token."""
    place_n: Tensor
    """int64 [n], its place in it."""
    sample_m: Tensor
    """int64 [m], sample of each decoder token."""
    row_m: Tensor
    """int64 [m], its decoder row."""
    visible_m: Tensor | None = None
    """int64 [m], as `Packing.visible_m`."""


@dataclass(frozen=True)
class Attended:
    """Which queries attend to which keys: those of sequence s to those of sequence s."""

    queries: Segments
    keys: Segments
    causal: bool = False
    visible: np.ndarray | None = None
    """int64 [n], how many keys of its sequence each query attends to, from the first on; None:
    all."""
    by_length: bool = True
    """Neighbours have like lengths; otherwise a group takes sequences of any length."""
    branch: np.ndarray | None = None
    """int64 [n], of queries that are keys too: the branch a token belongs to, -1 for the stem. A
    token attends to what of the stem is visible, and to its own branch up to itself."""
    marks: Marks | None = None
    """Of micro-batches of one size."""

    @property
    def by_whole_sequences(self) -> bool:
        """Whether a query sees all of its sequence, or all before itself."""
        partly = self.visible is not None or (self.marks and self.marks.visible is not None)
        return not partly

    @cached_property
    def seen_nk(self) -> Tensor:
        """`Marks.seen`, made once for all layers."""
        assert self.marks is not None
        return self.marks.seen(self.causal)

    def to(self, device: torch.device) -> Attended:
        """The same, with offsets of the sequences where a kernel reads them."""

        def moved(segments: Segments) -> Segments:
            return replace(segments, cu_seqlens=segments.cu_seqlens.to(device, non_blocking=True))

        return replace(self, queries=moved(self.queries), keys=moved(self.keys))

    @cached_property
    def groups(self) -> list[Group]:
        """The sequences cut into rectangles, with little padding where neighbours have like
        lengths."""
        shortest_share = SHORTEST_SHARE if self.by_length else 0.0
        groups = []
        for first, last in _runs(self.keys.lengths, shortest_share):
            queries, keys = (_group_tokens(each, first, last) for each in (self.queries, self.keys))
            if queries.number == 0:
                continue
            # Padding sees one key: a softmax over none would give NaN.
            visible_cQ = _in_rectangle(self.visible, queries, last - first, 1)
            branch_cQ = _in_rectangle(self.branch, queries, last - first, -1)
            groups.append(Group(last - first, queries, keys, visible_cQ, branch_cQ))
        return groups

    def groups_on(self, device: torch.device) -> list[Group]:
        """`groups` with their indices on a device, moved there once, by one copy."""
        if device.type == "cpu":
            return self.groups
        moved: list[Group] | None = self.__dict__.get("_groups_moved")
        if moved is None:
            moved = self.__dict__["_groups_moved"] = _groups_moved(self.groups, device)
        return moved


@dataclass(frozen=True)
class Joined:
    """The encoder's and the decoder's tokens of each sample as one sequence, for a model that has
    one stack of layers for both: a stem, and a branch for each decoder row."""

    order_s: Tensor
    """int64 [n + m], for each token its index among the encoder's tokens and then the
    decoder's."""
    places_m: Tensor
    """int64 [m], where each decoder token is."""
    positions_s: Tensor
    """int64 [n + m], position of each token in its stem or after what it sees of it."""
    attended: Attended


@dataclass(frozen=True)
class Packing:
    """The three attentions of a packed micro-batch. Decoder rows of one sample are neighbours and
    share its encoder tokens."""

    encoder: Segments
    """n encoder tokens by sample."""
    targets: Segments
    """m decoder tokens by sample."""
    rows: Segments
    """m decoder tokens by decoder row."""
    positions_m: Tensor
    """int64 [m], position of each decoder token in its row."""
    causal: bool = False
    """Whether encoder tokens attend to earlier ones alone."""
    visible_m: np.ndarray | None = None
    """int64 [m], how many of its sample's encoder tokens a decoder token attends to, from the first
    on; None: all."""
    fixed: FixedMarks | None = None
    """Of micro-batches of one size, whose `visible_m` is in here."""

    @cached_property
    def within_encoder(self) -> Attended:
        fixed = self.fixed
        marks = None if fixed is None else Marks(fixed.sample_n, fixed.sample_n)
        return Attended(self.encoder, self.encoder, causal=self.causal, marks=marks)

    @cached_property
    def within_decoder(self) -> Attended:
        fixed = self.fixed
        marks = None if fixed is None else Marks(fixed.row_m, fixed.row_m)
        return Attended(self.rows, self.rows, causal=True, by_length=False, marks=marks)

    @cached_property
    def across(self) -> Attended:
        fixed, marks = self.fixed, None
        if fixed is not None:
            marks = Marks(fixed.sample_m, fixed.sample_n, fixed.visible_m, fixed.place_n)
        return Attended(self.targets, self.encoder, visible=self.visible_m, marks=marks)

    @cached_property
    def joined(self) -> Joined:
        """The tokens of each sample as one sequence."""
        # Two samples of 3 and 2 encoder tokens, decoder rows of 2, 1 and 2, the first two of sample
        # 0, which see 2 and 3 tokens of it:
        #   order_s = [0 1 2 5 6 7 | 3 4 8 9], places_m = [3 4 5 8 9]
        #   visible_s = [1 2 3 2 2 3 | 1 2 2 2], branch_s = [- - - 0 0 1 | - - 2 2]
        #   positions_s = [0 1 2 2 3 3 | 0 1 2 3]
        stems, answers = self.encoder.lengths, self.targets.lengths
        num_stem, samples = int(self.encoder.offsets[-1]), np.arange(len(stems))
        sample_s = np.concatenate([np.repeat(samples, stems), np.repeat(samples, answers)])
        order_s = np.argsort(sample_s, kind="stable")
        places_s = np.argsort(order_s)
        within_n = np.arange(num_stem) - np.repeat(self.encoder.offsets[:-1], stems)
        visible_m = np.repeat(stems, answers) if self.visible_m is None else self.visible_m
        branch_m = np.repeat(np.arange(len(self.rows.lengths)), self.rows.lengths)
        within_m = np.arange(len(visible_m)) - np.repeat(self.rows.offsets[:-1], self.rows.lengths)
        positions_m = visible_m + within_m
        visible_s = np.concatenate([within_n + 1, visible_m])[order_s]
        branch_s = np.concatenate([np.full(num_stem, -1), branch_m])[order_s]
        segments = segments_of(stems + answers)
        # One row after the whole stem is causal attention over both.
        sample_of_row = np.searchsorted(self.targets.offsets[1:], self.rows.offsets[:-1], "right")
        if len(np.unique(sample_of_row)) == len(sample_of_row) and np.array_equal(
            visible_m, np.repeat(stems, answers)
        ):
            attended = Attended(segments, segments, causal=True)
        else:
            attended = Attended(segments, segments, visible=visible_s, branch=branch_s)
        return Joined(
            order_s=torch.from_numpy(order_s),
            places_m=torch.from_numpy(places_s[num_stem:]),
            positions_s=torch.from_numpy(np.concatenate([within_n, positions_m])[order_s]),
            attended=attended,
        )

    def last_sequence(self) -> tuple[slice, slice, Packing]:
        """The encoder tokens of the last sample, the decoder tokens of its last row, and the
        packing of both alone."""
        tokens, targets = (
            slice(int(segments.offsets[-2]), int(segments.offsets[-1]))
            for segments in (self.encoder, self.rows)
        )
        row = segments_of(self.rows.lengths[-1:])
        packing = Packing(
            encoder=segments_of(self.encoder.lengths[-1:]),
            targets=row,
            rows=row,
            positions_m=self.positions_m[targets],
            causal=self.causal,
            visible_m=None if self.visible_m is None else self.visible_m[targets],
        )
        return tokens, targets, packing


def _in_rectangle(
    values: np.ndarray | None, tokens: GroupTokens, size: int, fill: int
) -> Tensor | None:
    """A group's share of a packed array as [c, L], `fill` on padding."""
    if values is None:
        return None
    rectangle = torch.full((size * tokens.longest,), fill, dtype=torch.long)
    of_group = values[tokens.first : tokens.first + tokens.number]
    rectangle[slice(None) if tokens.slots is None else tokens.slots] = torch.from_numpy(of_group)
    return rectangle.view(size, tokens.longest)


def filled_size(num_tokens: int) -> int:
    """The next larger of few numbers of tokens, at most a 32nd away and on average half of that.

    What is prepared once for a shape is then used again: oneDNN's matrix products (some 3 ms each),
    compiled and captured graphs."""
    step = 1 << max(3, num_tokens.bit_length() - 6)
    return -(-num_tokens // step) * step


def segments_of(lengths: np.ndarray) -> Segments:
    """Segments of these lengths, int [S]."""
    offsets = offsets_of(lengths).astype(np.int32)
    return Segments(offsets, torch.from_numpy(offsets))


def _runs(lengths_S: np.ndarray, shortest_share: float) -> list[tuple[int, int]]:
    """[first, last) of each group: neighbours of one length, and of nearly one where those would be
    few tokens."""
    if not len(lengths_S):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(lengths_S)) + 1, [len(lengths_S)]])
    runs: list[tuple[int, int]] = []
    first, longest = 0, int(lengths_S[0])
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        length = int(lengths_S[start])
        alike = not shortest_share or shortest_share * longest <= length <= longest
        most = max((start - first) * longest, (end - start) * length)
        if start > first and (most >= WORTH_A_GROUP or not alike):
            runs.append((first, start))
            first, longest = start, length
        longest = max(longest, length)
    return [*runs, (first, len(lengths_S))]


def _groups_moved(groups: list[Group], device: torch.device) -> list[Group]:
    """The groups with their indices on a device, by one copy."""
    indices = [
        found
        for group in groups
        for found in (group.queries.slots, group.keys.slots, group.visible_cQ, group.branch_cQ)
        if found is not None
    ]
    flat = torch.cat([torch.empty(0, dtype=torch.long), *(found.flatten() for found in indices)])
    flat = flat.pin_memory() if device.type == "cuda" else flat
    parts = flat.to(device, non_blocking=True).split([found.numel() for found in indices])
    moved = iter([part.view(found.shape) for part, found in zip(parts, indices, strict=True)])

    def next_of(found: Tensor | None) -> Tensor | None:
        return None if found is None else next(moved)

    return [
        Group(
            group.size,
            group.queries._replace(slots=next_of(group.queries.slots)),
            group.keys._replace(slots=next_of(group.keys.slots)),
            next_of(group.visible_cQ),
            next_of(group.branch_cQ),
        )
        for group in groups
    ]


def _group_tokens(segments: Segments, first: int, last: int) -> GroupTokens:
    """The tokens of sequences [first, last) of a packed array."""
    # Three sequences of 3, 2 and 1 tokens are one rectangle of 3 x 3 slots:
    #   sequence = [0 0 0 1 1 2], within = [0 1 2 0 1 0], slots = [0 1 2 3 4 6]
    # Slots 5, 7 and 8 are padding, which `packed_attention` keeps out of every softmax.
    lengths = segments.lengths[first:last]
    start, end = int(segments.offsets[first]), int(segments.offsets[last])
    longest = int(lengths.max())
    if end - start == longest * len(lengths):
        return GroupTokens(start, end - start, longest, None)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(end - start) - np.repeat(segments.offsets[first:last] - start, lengths)
    slots = torch.from_numpy(sequence * longest + within)
    return GroupTokens(start, end - start, longest, slots)
