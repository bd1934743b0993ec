"""Where sequences lie that stand one behind another, without padding, in one array of tokens."""

# S sequences, B samples, R decoder rows, n encoder tokens, m decoder tokens

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WORTH_A_GROUP = 1024
"""Tokens from which sequences of one length are a rectangle of their own: fewer are padded to a
longer neighbour's length."""

SHORTEST_SHARE = 0.75
"""Of a rectangle's length, from which a shorter sequence may still be padded to it."""


class Part(NamedTuple):
    """A group's queries, or its keys."""

    first: int
    """Token."""
    number: int
    """Tokens."""
    longest: int
    """Length of the rectangle."""
    slots: Tensor | None
    """int64 [number], place of each token in the rectangle; None: it is filled."""


class Group(NamedTuple):
    """Neighbouring sequences whose attention is computed as one rectangle, on devices without a
    kernel for ragged ones."""

    size: int
    """Sequences."""
    queries: Part
    keys: Part
    visible_cQ: Tensor | None
    """int64 [c, Q], keys that each query may look at, the first so many; None: all."""


@dataclass(frozen=True)
class Spans:
    """Sequences one behind another."""

    offsets: np.ndarray
    """int32 [S + 1], first token of each, and the end."""
    on_device: Tensor | None = None
    """The same where the tokens are, for a kernel that reads them there."""

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))

    def to(self, device: torch.device) -> Spans:
        if device.type == "cpu":
            return self
        return replace(self, on_device=torch.from_numpy(self.offsets).to(device, non_blocking=True))


@dataclass(frozen=True)
class Attended:
    """Which queries look at which keys: sequence s of one at sequence s of the other."""

    queries: Spans
    keys: Spans
    causal: bool = False
    visible: np.ndarray | None = None
    """int64 [n], keys of its sequence that each query may look at, the first so many; None: all."""
    by_length: bool = True
    """Neighbours are of like length; otherwise a group takes what comes."""

    @cached_property
    def groups(self) -> list[Group]:
        """The sequences cut into rectangles with little padding; neighbours of like length are the
        caller's to provide."""
        return [
            self._group(first, last)
            for first, last in _runs(self.keys.lengths, SHORTEST_SHARE if self.by_length else 0.0)
            if self.queries.offsets[last] > self.queries.offsets[first]
        ]

    def _group(self, first: int, last: int) -> Group:
        queries, keys = _part(self.queries, first, last), _part(self.keys, first, last)
        if self.visible is None:
            return Group(last - first, queries, keys, None)
        # Where no query stands it sees one key: a softmax of nothing would be no number.
        visible = torch.ones((last - first) * queries.longest, dtype=torch.long)
        places = slice(None) if queries.slots is None else queries.slots
        visible[places] = torch.from_numpy(
            self.visible[queries.first : queries.first + queries.number]
        )
        return Group(last - first, queries, keys, visible.view(last - first, queries.longest))


@dataclass(frozen=True)
class Packing:
    """The three attentions of a packed micro-batch. Decoder rows of one sample stand together and
    share its encoder tokens."""

    encoder: Spans
    """n encoder tokens by sample."""
    targets: Spans
    """m decoder tokens by sample."""
    rows: Spans
    """m decoder tokens by decoder row."""
    positions_m: Tensor
    """int64 [m], place of each decoder token in its row."""
    causal: bool = False
    """Encoder tokens see those before them alone."""
    visible_m: np.ndarray | None = None
    """int64 [m], encoder tokens that a decoder token may look at, the first so many of its
    sample's; None: all."""

    @cached_property
    def within_encoder(self) -> Attended:
        return Attended(self.encoder, self.encoder, causal=self.causal)

    @cached_property
    def within_decoder(self) -> Attended:
        return Attended(self.rows, self.rows, causal=True, by_length=False)

    @cached_property
    def across(self) -> Attended:
        return Attended(self.targets, self.encoder, visible=self.visible_m)

    def to(self, device: torch.device) -> Packing:
        encoder, targets, rows = (
            spans.to(device) for spans in (self.encoder, self.targets, self.rows)
        )
        positions_m = self.positions_m.to(device, non_blocking=True)
        return replace(self, encoder=encoder, targets=targets, rows=rows, positions_m=positions_m)

    def last(self) -> tuple[slice, slice, Packing]:
        """The last sample by itself: (its encoder tokens, those of its last decoder row, their
        packing)."""
        tokens, targets = (
            slice(int(spans.offsets[-2]), int(spans.offsets[-1]))
            for spans in (self.encoder, self.rows)
        )
        row = spans_of(self.rows.lengths[-1:])
        visible_m = None if self.visible_m is None else self.visible_m[targets]
        encoder = spans_of(self.encoder.lengths[-1:])
        return (
            tokens,
            targets,
            Packing(encoder, row, row, self.positions_m[targets], self.causal, visible_m),
        )


def filled_size(num_tokens: int) -> int:
    """The next larger of few numbers of tokens, at most a 32nd away and on average half of that.

    What is prepared for a shape, matrix products of oneDNN (some 3 ms each) and compiled or
    captured graphs, is then used again."""
    step = 1 << max(3, num_tokens.bit_length() - 6)
    return -(-num_tokens // step) * step


def spans_of(lengths: np.ndarray) -> Spans:
    return Spans(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


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
        large = (start - first) * longest >= WORTH_A_GROUP or (
            end - start
        ) * length >= WORTH_A_GROUP
        if start > first and (large or not alike):
            runs.append((first, start))
            first, longest = start, length
        longest = max(longest, length)
    return [*runs, (first, len(lengths_S))]


def _part(spans: Spans, first: int, last: int) -> Part:
    lengths = spans.lengths[first:last]
    start, end, longest = int(spans.offsets[first]), int(spans.offsets[last]), int(lengths.max())
    if end - start == longest * len(lengths):
        return Part(start, end - start, longest, None)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(end - start) - np.repeat(spans.offsets[first:last] - start, lengths)
    return Part(start, end - start, longest, torch.from_numpy(sequence * longest + within))
