"""Decoder rows of padded micro-batches that share their sample's encoder states: keys and values
are made once a sample."""

# B samples, R decoder rows, Q rows of the sample that has most, L input tokens, T target tokens, D
# width, H heads, d width of a head

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.data.batch import SampleRows
from genrec_dist.model.network import attention_bias

if TYPE_CHECKING:
    from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer


def rows_bias(rows: SampleRows, visible_R: Tensor, num_targets: int, memory_BLD: Tensor) -> Tensor:
    """What is added to the scores of `decoder_layer`, [B, 1, Q x T, L]: -inf from a row's first
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


def decoder_layer(
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
    mixed_RTD = _across(layer.encoder_attn, hidden_RTD, memory_BLD, memory_bias, rows)
    hidden_RTD = layer.encoder_attn_layer_norm(hidden_RTD + dropped(mixed_RTD, layer.dropout))
    inner = dropped(layer.activation_fn(layer.fc1(hidden_RTD)), layer.activation_dropout)
    total_RTD = hidden_RTD + dropped(layer.fc2(inner), layer.dropout)
    normed: Tensor = layer.final_layer_norm(total_RTD)
    return normed


def _across(
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
