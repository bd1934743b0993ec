"""BART's layers over packed tokens: the same weights and the same sums, without padding and with
few conversions."""

# n encoder tokens, m decoder tokens, D width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genrec_dist.data.packing import Attended, Packing
from genrec_dist.model import sample_rows
from genrec_dist.model.dropout import add_dropped, drop
from genrec_dist.model.network import product_dtype
from genrec_dist.model.packed_attention import attend

if TYPE_CHECKING:
    from transformers.models.bart.modeling_bart import (
        BartAttention,
        BartDecoderLayer,
        BartEncoderLayer,
    )


class LayerRunner:
    """Runs the layers of packed micro-batches: as they are written or compiled, with all that
    backward reads kept or computed again.

    Args:
        compiled: one graph for all sizes of micro-batches; attention over ragged sequences breaks
            it in two.
        recompute: keep each layer's input alone (activation checkpointing).
    """

    def __init__(self, compiled: bool = False, recompute: bool = False):
        self.recompute = recompute
        self.encoder_layer, self.decoder_layer = encoder_layer, decoder_layer
        if compiled:
            self.encoder_layer = torch.compile(encoder_layer, dynamic=True)
            self.decoder_layer = torch.compile(decoder_layer, dynamic=True)

    def encode(self, layer: BartEncoderLayer, hidden_nD: Tensor, packing: Packing) -> Tensor:
        return self._run(layer, self.encoder_layer, hidden_nD, packing)

    def decode(
        self, layer: BartDecoderLayer, hidden_mD: Tensor, memory_nD: Tensor, packing: Packing
    ) -> Tensor:
        return self._run(layer, self.decoder_layer, hidden_mD, memory_nD, packing)

    def decode_rows(self, layer: BartDecoderLayer, hidden_RTD: Tensor, *inputs: Any) -> Tensor:
        """A layer of padded rows that share their sample's memory (`sample_rows`)."""
        return self._run(layer, sample_rows.decoder_layer, hidden_RTD, *inputs)

    def _run(self, layer: Any, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.recompute and layer.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(function, layer, *inputs, use_reentrant=False)
            return again
        return function(layer, *inputs)


def encoder_layer(layer: BartEncoderLayer, hidden_nD: Tensor, packing: Packing) -> Tensor:
    """The states after a layer of the encoder, float [n, D]."""
    low_nD = lowered(hidden_nD)
    mixed_nD = _attention(layer.self_attn, low_nD, low_nD, packing.within_encoder)
    hidden_nD = layer.self_attn_layer_norm(
        add_dropped(hidden_nD, mixed_nD, layer.dropout, layer.training)
    )
    return _feed_forward(layer, hidden_nD)


def decoder_layer(
    layer: BartDecoderLayer, hidden_mD: Tensor, memory_nD: Tensor, packing: Packing
) -> Tensor:
    """The states after a layer of the decoder, float [m, D]. `memory_nD`: of the encoder,
    `lowered`."""
    low_mD = lowered(hidden_mD)
    mixed_mD = _attention(layer.self_attn, low_mD, low_mD, packing.within_decoder)
    hidden_mD = layer.self_attn_layer_norm(
        add_dropped(hidden_mD, mixed_mD, layer.dropout, layer.training)
    )
    mixed_mD = _attention(layer.encoder_attn, lowered(hidden_mD), memory_nD, packing.across)
    hidden_mD = layer.encoder_attn_layer_norm(
        add_dropped(hidden_mD, mixed_mD, layer.dropout, layer.training)
    )
    return _feed_forward(layer, hidden_mD)


def lowered(hidden: Tensor) -> Tensor:
    """In the type of matrix products. Autocast by itself would convert the input of three
    projections three times."""
    return hidden.to(product_dtype(hidden))


def _attention(
    attention: BartAttention, low_nD: Tensor, low_kD: Tensor, attended: Attended
) -> Tensor:
    heads = (attention.num_heads, attention.head_dim)
    query = attention.q_proj(low_nD).unflatten(-1, heads)
    key = attention.k_proj(low_kD).unflatten(-1, heads)
    value = attention.v_proj(low_kD).unflatten(-1, heads)
    dropout = attention.dropout if attention.training else 0.0
    mixed_nHd = attend(query, key, value, attended, attention.scaling, dropout)
    projected: Tensor = attention.out_proj(mixed_nHd.flatten(1))
    return projected


def _feed_forward(layer: BartEncoderLayer | BartDecoderLayer, hidden_nD: Tensor) -> Tensor:
    inner = layer.activation_fn(layer.fc1(lowered(hidden_nD)))
    inner = drop(inner, layer.activation_dropout, layer.training)
    total_nD = add_dropped(hidden_nD, layer.fc2(inner), layer.dropout, layer.training)
    normed: Tensor = layer.final_layer_norm(total_nD)
    return normed
