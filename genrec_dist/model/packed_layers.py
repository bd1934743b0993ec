"""BART's layers written out, with its weights and its sums: over packed tokens, without padding and
with few conversions; and over padded decoder rows that share their sample's memory."""

# n encoder tokens, m decoder tokens, D width, H heads, d width of a head; padded: B samples, R
# decoder rows, Q places for rows of a sample, L input tokens, T target tokens

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genrec_dist.data.batch import SampleRows
from genrec_dist.data.packing import Attended, Packing
from genrec_dist.model.dropout import add_dropped, drop
from genrec_dist.model.network import attention_bias, product_dtype
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
        """A layer of padded rows that share their sample's memory (`rows_decoder_layer`)."""
        return self._run(layer, rows_decoder_layer, hidden_RTD, *inputs)

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


def rows_bias(rows: SampleRows, visible_R: Tensor, num_targets: int, memory_BLD: Tensor) -> Tensor:
    """What `rows_decoder_layer` adds to its scores, [B, 1, Q x T, L]: -inf from a row's first
    invisible token on. A place without a row sees one token: a softmax over none would give NaN.

    Args:
        rows: where the rows are.
        visible_R: int64, how many of its sample's tokens each row sees.
        num_targets: T.
        memory_BLD: the encoder's states.
    """
    num_samples, num_tokens = memory_BLD.shape[:2]
    visible = torch.ones(num_samples * rows.most, dtype=torch.long, device=visible_R.device)
    visible = visible.index_copy_(0, rows.places_R, visible_R)
    visible_BQ = visible.view(num_samples, rows.most).repeat_interleave(num_targets, 1)
    columns_L = torch.arange(num_tokens, device=visible_R.device)
    return attention_bias((columns_L < visible_BQ[..., None])[:, None], memory_BLD)


def rows_decoder_layer(
    layer: BartDecoderLayer,
    hidden_RTD: Tensor,
    causal_bias: Tensor,
    memory_BLD: Tensor,
    memory_bias: Tensor,
    rows: SampleRows,
) -> Tensor:
    """The states after a layer of BART's decoder, whose own forward pass takes the encoder's states
    of each row: of 50 rows of a sample it would make the same keys and values 50 times."""

    def dropped(values: Tensor, share: float) -> Tensor:
        return F.dropout(values, share, layer.training)

    mixed_RTD, _ = layer.self_attn(hidden_RTD, attention_mask=causal_bias)
    hidden_RTD = layer.self_attn_layer_norm(hidden_RTD + dropped(mixed_RTD, layer.dropout))
    mixed_RTD = _attention_by_sample(layer.encoder_attn, hidden_RTD, memory_BLD, memory_bias, rows)
    hidden_RTD = layer.encoder_attn_layer_norm(hidden_RTD + dropped(mixed_RTD, layer.dropout))
    inner = dropped(layer.activation_fn(layer.fc1(hidden_RTD)), layer.activation_dropout)
    total_RTD = hidden_RTD + dropped(layer.fc2(inner), layer.dropout)
    normed: Tensor = layer.final_layer_norm(total_RTD)
    return normed


def _attention_by_sample(
    attention: BartAttention,
    hidden_RTD: Tensor,
    memory_BLD: Tensor,
    memory_bias: Tensor,
    rows: SampleRows,
) -> Tensor:
    # Three rows of T = 2 tokens, two of sample 0 and one of sample 1: most = 2, places_R = [0 1 2].
    #   queries by row [ab cd ef] -> by sample [[a b c d] [e f - -]], against the keys of each
    num_rows, num_targets, width = hidden_RTD.shape
    num_samples, heads = len(memory_BLD), (attention.num_heads, attention.head_dim)
    query_RE = attention.q_proj(hidden_RTD).flatten(1)
    query = query_RE.new_zeros(num_samples * rows.most, query_RE.shape[1])
    query = query.index_copy(0, rows.places_R, query_RE)
    query_BHQd = query.view(num_samples, rows.most * num_targets, *heads).transpose(1, 2)
    key_BHLd = attention.k_proj(memory_BLD).unflatten(-1, heads).transpose(1, 2)
    value_BHLd = attention.v_proj(memory_BLD).unflatten(-1, heads).transpose(1, 2)
    mixed_BHQd = F.scaled_dot_product_attention(
        query_BHQd,
        key_BHLd,
        value_BHLd,
        attn_mask=memory_bias,
        dropout_p=attention.dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    mixed = mixed_BHQd.transpose(1, 2).reshape(num_samples * rows.most, num_targets * width)
    mixed_RTD = mixed.index_select(0, rows.places_R).view(num_rows, num_targets, width)
    projected: Tensor = attention.out_proj(mixed_RTD)
    return projected
