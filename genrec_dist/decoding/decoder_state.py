"""The decoder of a running search: what all beams of a user share is computed once a user."""

# B users, K beams, H heads, L input tokens, P prefix tokens, D width

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer

from genrec_dist.model.genrec import POSITION_OFFSET, GenRecForConditionalGeneration


class DecoderState:
    """Keys and values of a search: the encoder's and those of the prefix once a user, the rest once
    a beam.

    Beams of a user are query rows over her one set of encoder keys, so 20 beams read it once
    (EL-attention, arXiv 2105.04779). Shapes depend on sizes alone and nothing waits for the device:
    a search can be captured in a graph."""

    def __init__(
        self,
        model: GenRecForConditionalGeneration,
        memory_BLD: Tensor,
        memory_mask_BL: Tensor,
        *,
        static: bool = False,
    ):
        """`static`: project padding too, whose number is a value; otherwise the encoder's real
        tokens alone."""
        self.model = model
        self.mask_B11L = memory_mask_BL[:, None, None]
        with_state = model.config.decoder_start == "state"
        self.start_BD = model.masked_states(memory_BLD, memory_mask_BL) if with_state else None
        layers = model.model.decoder.layers
        real_n = None if static else memory_mask_BL.flatten().nonzero()[:, 0]
        if real_n is None or len(real_n) == memory_mask_BL.numel():
            self.cross = [_keys_and_values(layer.encoder_attn, memory_BLD) for layer in layers]
        else:
            memory_nD = memory_BLD.flatten(0, 1)[real_n]
            self.cross = [
                _keys_and_values_of(layer.encoder_attn, memory_nD, real_n, memory_BLD.shape)
                for layer in layers
            ]
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """[B, H, P, D / H] a layer."""
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        """[B, K, H, tokens since the prefix, D / H] a layer."""
        self.num_tokens = 0

    def start(self, prefix_P: Tensor) -> Tensor:
        """Take in the tokens that every beam of every user begins with; decoder states behind each,
        float [B, P, D]."""
        num_users = len(self.mask_B11L)
        hidden_BPD = self._embed(prefix_P, self.start_BD).expand(num_users, -1, -1)
        for number, layer in enumerate(self.model.model.decoder.layers):
            attention = layer.self_attn
            keys, values = _keys_and_values(attention, hidden_BPD)
            self.prefix.append((keys, values))
            query = _heads(attention, attention.q_proj(hidden_BPD))
            mixed = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=attention.scaling
            )
            hidden_BPD = self._finish_layer(layer, number, hidden_BPD, _joined(mixed))
        self.num_tokens = len(prefix_P)
        return hidden_BPD

    def step(self, tokens_BK: Tensor) -> Tensor:
        """Take one token a beam in and give the decoder states behind it, float [B, K, D]."""
        hidden_BKD = self._embed(tokens_BK)
        for number, layer in enumerate(self.model.model.decoder.layers):
            hidden_BKD = self._finish_layer(
                layer, number, hidden_BKD, self._attend_self(layer.self_attn, number, hidden_BKD)
            )
        self.num_tokens += 1
        return hidden_BKD

    def follow(self, parent_BK: Tensor) -> None:
        """Let each beam continue the beam `parent_BK` names; the number of beams may change."""
        self.own = [
            pair and (_take_beams(pair[0], parent_BK), _take_beams(pair[1], parent_BK))
            for pair in self.own
        ]

    def fork(self, parent_BK: Tensor) -> DecoderState:
        """Another search from here, as `follow` would leave it; this one stays as it is."""
        other = object.__new__(DecoderState)
        other.__dict__.update(self.__dict__)
        other.follow(parent_BK)
        return other

    def _embed(self, tokens: Tensor, start_BD: Tensor | None = None) -> Tensor:
        """Tokens of one position a column of [P], or of one position in all of [B, K]. `start_BD`:
        added to the first column."""
        decoder = self.model.model.decoder
        first = POSITION_OFFSET + self.num_tokens
        last = first + (len(tokens) if tokens.dim() == 1 else 1)
        embedded = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[first:last]
        if start_BD is not None:
            rest_BPD = embedded[1:].expand(len(start_BD), -1, -1)
            embedded = torch.cat([(embedded[0] + start_BD)[:, None], rest_BPD], 1)
        return decoder.layernorm_embedding(embedded)

    def _finish_layer(
        self, layer: BartDecoderLayer, number: int, hidden_BKD: Tensor, mixed_BKD: Tensor
    ) -> Tensor:
        """The layer after its self-attention has mixed values."""
        hidden_BKD = layer.self_attn_layer_norm(hidden_BKD + layer.self_attn.out_proj(mixed_BKD))
        attention = layer.encoder_attn
        query = _heads(attention, attention.q_proj(hidden_BKD))
        mixed = F.scaled_dot_product_attention(
            query, *self.cross[number], attn_mask=self.mask_B11L, scale=attention.scaling
        )
        hidden_BKD = layer.encoder_attn_layer_norm(hidden_BKD + attention.out_proj(_joined(mixed)))
        widened = layer.fc2(layer.activation_fn(layer.fc1(hidden_BKD)))
        return layer.final_layer_norm(hidden_BKD + widened)

    def _attend_self(self, attention: BartAttention, number: int, hidden_BKD: Tensor) -> Tensor:
        """Over the shared prefix by matrix products, over a beam's own few tokens element by
        element."""
        query_BKHd, key, value = (
            project(hidden_BKD).unflatten(-1, (attention.num_heads, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = key[:, :, :, None], value[:, :, :, None]
        past = self.own[number]
        if past is not None:
            keys, values = torch.cat([past[0], keys], 3), torch.cat([past[1], values], 3)
        self.own[number] = (keys, values)
        prefix_keys, prefix_values = self.prefix[number]
        on_prefix = (query_BKHd.transpose(1, 2) @ prefix_keys.transpose(2, 3)).transpose(1, 2)
        on_own = (query_BKHd[:, :, :, None] * keys).sum(-1)
        weights = torch.cat([on_prefix, on_own], -1).mul_(attention.scaling).softmax(-1)
        num_prefix = prefix_keys.shape[2]
        from_prefix = (weights[..., :num_prefix].transpose(1, 2) @ prefix_values).transpose(1, 2)
        from_own = (weights[..., num_prefix:, None] * values).sum(3)
        return (from_prefix + from_own).flatten(2)


def _keys_and_values(attention: BartAttention, states_BLD: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(attention, attention.k_proj(states_BLD)), _heads(
        attention, attention.v_proj(states_BLD)
    )


def _keys_and_values_of(
    attention: BartAttention, states_nD: Tensor, places_n: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """As `_keys_and_values` of [B, L, D], zeros at all places but these."""
    spread = [
        # Under autocast the projection's type is not that of what it projects.
        projected.new_zeros(shape).flatten(0, 1).index_copy_(0, places_n, projected).view(shape)
        for projected in (attention.k_proj(states_nD), attention.v_proj(states_nD))
    ]
    return _heads(attention, spread[0]), _heads(attention, spread[1])


def _heads(attention: BartAttention, states: Tensor) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _joined(mixed: Tensor) -> Tensor:
    """[B, H, L, D / H] -> [B, L, D]."""
    return mixed.transpose(1, 2).flatten(2)


def _take_beams(cached: Tensor, parent_BK: Tensor) -> Tensor:
    rows_B1 = torch.arange(len(parent_BK), device=parent_BK.device)[:, None]
    return cached[rows_B1, parent_BK]
