"""Counts that the operations of a micro-batch follow from. Padding counts nothing, repeated samples neither."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """Counts that the operations follow from."""

    inputs: int = 0
    """Encoder tokens."""
    targets: int = 0
    """Decoder tokens."""
    labels: int = 0
    """Those of them that are learned."""
    encoder_pairs: int = 0
    """Sum of L^2 over samples."""
    decoder_pairs: int = 0
    """Sum of T^2 over decoder rows."""
    cross_pairs: int = 0
    """Sum of T x L over decoder rows."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))
