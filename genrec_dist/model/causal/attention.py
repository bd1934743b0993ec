"""The attentions of a prompted model, which the layers of any causal language model of transformers
call by name."""

# B users or rows, H query heads, G key and value heads, L prompt tokens, S tokens of prompt and
# answer, K beams, d width of a head, s packed tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from genrec_dist.data.packing import Attended
from genrec_dist.model.causal.packed_rows import PackedRows
from genrec_dist.model.network import product_dtype
from genrec_dist.model.packed_attention import attend

NAME = "genrec_dist"
"""Of the attention, as `attn_implementation`."""


@dataclass(frozen=True)
class AttentionCall:
    """What a layer hands to its attention."""

    layer: int
    """Its number."""
    query_BHSd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    scale: float
    """Factor of the products of queries and keys."""
    dropout: float
    """Of the weights."""

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Once for each query head, [B, H, S, d]."""
        keys_BHSd = per_query_head(self.key_BGSd, self.query_BHSd)
        return keys_BHSd, per_query_head(self.value_BGSd, self.query_BHSd)

    def unpacked(self, rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, L, H, d], keys and values [B, L, G, d] of packed tokens, in their rows."""
        arrays = (self.query_BHSd, self.key_BGSd, self.value_BGSd)
        query, key, value = (rows.unpack(array[0].transpose(0, 1)) for array in arrays)
        return query, key, value


class Attention(Protocol):
    """What a pass through the layers does with their queries, keys and values."""

    def mix(self, call: AttentionCall) -> Tensor:
        """The mixed values of each query, [B, H, S, d]."""


class PromptAttention:
    """Causal, over packed prompts; keeps keys and values for the answers."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows
        self.kept: list[Tensor] = []
        """[B, L, 2, G, d] of each layer."""

    def mix(self, call: AttentionCall) -> Tensor:
        assert call.layer == len(self.kept), "layers out of order"
        query_BLHd, key_BLGd, value_BLGd = call.unpacked(self.rows)
        self.kept.append(torch.stack([key_BLGd, value_BLGd], 2))
        query_BHLd = query_BLHd.transpose(1, 2)
        keys, values = (
            per_query_head(array.transpose(1, 2), query_BHLd) for array in (key_BLGd, value_BLGd)
        )
        mixed_BHLd = F.scaled_dot_product_attention(
            query_BHLd, keys, values, is_causal=True, scale=call.scale
        )
        return self.rows.pack(mixed_BHLd.transpose(1, 2)).transpose(0, 1)[None]


class MaskedAttention:
    """Over padded rows, under a mask of which key each query sees."""

    def __init__(self, seen_BSS: Tensor):
        self.seen_B1SS = seen_BSS[:, None]

    def mix(self, call: AttentionCall) -> Tensor:
        return F.scaled_dot_product_attention(
            call.query_BHSd,
            *call.keys_and_values(),
            self.seen_B1SS,
            dropout_p=call.dropout,
            scale=call.scale,
        )


class PackedAttention:
    """Over packed sequences, [1, H, s, d]."""

    def __init__(self, attended: Attended):
        self.attended = attended

    def mix(self, call: AttentionCall) -> Tensor:
        arrays = (call.query_BHSd, *call.keys_and_values())
        packed = (array[0].transpose(0, 1).contiguous() for array in arrays)
        return attend(*packed, self.attended, call.scale, call.dropout).transpose(0, 1)[None]


def per_query_head(values_BGSd: Tensor, query_BHSd: Tensor) -> Tensor:
    """Keys or values once for each query head, [B, H, S, d]."""
    repeats = query_BHSd.shape[1] // values_BGSd.shape[1]
    return values_BGSd if repeats == 1 else values_BGSd.repeat_interleave(repeats, 1)


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    genrec_attention: Attention,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; the pass's own attention comes by way of the model's forward."""
    # Under autocast rotated queries and keys are float32 and values are not.
    query, key, value = (values.to(product_dtype(values)) for values in (query, key, value))
    call = AttentionCall(module.layer_idx, query, key, value, scaling, dropout)
    mixed = genrec_attention.mix(call)
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, _interface)
