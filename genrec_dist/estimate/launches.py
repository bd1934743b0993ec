"""How many operators a micro-batch launches, by formula: what a host has to issue one by one."""

from __future__ import annotations

from dataclasses import dataclass

from genrec_dist.model.genrec import GenRecConfig


@dataclass(frozen=True)
class Layers:
    """Launches of forward and backward."""

    encoder: tuple[int, int] = (0, 0)
    """Of a layer of the encoder."""
    decoder: tuple[int, int] = (0, 0)
    """Of a layer of the decoder."""
    fixed: tuple[int, int] = (0, 0)
    """Of embeddings, norms, head and loss."""


# Counted on fake tensors (tests/unit/training/test_fake_cuda.py), a fused attention as one.
PADDED = {
    "fp32": Layers(encoder=(15, 28), decoder=(24, 46), fixed=(28, 20)),
    "bf16": Layers(encoder=(19, 34), decoder=(31, 56), fixed=(31, 24)),
}
PACKED = {
    "fp32": Layers(encoder=(13, 26), decoder=(20, 42), fixed=(20, 23)),
    "bf16": Layers(encoder=(16, 34), decoder=(25, 55), fixed=(20, 28)),
}
SHARED = Layers(decoder=(2, 3), fixed=(11, 6))
"""Besides, of padded rows that share their sample's keys and values, as those of a causal encoder
do."""
RECTANGLE = (21, 25)
"""Of a group of packed sequences whose attention is a padded rectangle."""
STEP = 30
"""Of clipping and AdamW, whose operators take many tensors at once."""


@dataclass(frozen=True)
class Rectangles:
    """How many rectangles each of the three attentions of a packed micro-batch goes by; 0: it goes
    by a kernel for ragged sequences."""

    encoder: int = 0
    decoder: int = 0
    cross: int = 0


def launches(
    config: GenRecConfig, bf16: bool, packed: Rectangles | None, shares_memory: bool = False
) -> tuple[int, int]:
    """Operators that forward and backward of a micro-batch launch.

    Args:
        config: of the model.
        bf16: whether matrix products have 16 bits.
        packed: of a packed micro-batch; None: it is padded.
        shares_memory: `MicroBatch.shares_memory`.
    """
    table = (PADDED if packed is None else PACKED)["bf16" if bf16 else "fp32"]
    more = SHARED if packed is None and shares_memory else Layers()
    by = packed or Rectangles()
    forward, backward = (
        config.encoder_layers * (table.encoder[way] + RECTANGLE[way] * by.encoder)
        + config.decoder_layers * (table.decoder[way] + more.decoder[way])
        + config.decoder_layers * RECTANGLE[way] * (by.decoder + by.cross)
        + table.fixed[way]
        + more.fixed[way]
        for way in (0, 1)
    )
    return forward, backward
