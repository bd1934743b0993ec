"""The decoder of a running search: what all beams of a user share is computed once per user."""

# B users, K beams, H heads, L input tokens, n real tokens, P prefix tokens, D width

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.decoding.beam_caches import BeamCaches, attend_beams
from genrec_dist.model.network import POSITION_OFFSET, BartNetwork

if TYPE_CHECKING:
    from transformers.models.bart.modeling_bart import BartAttention, BartDecoderLayer


class Searchable(Protocol):
    """What a search needs of a model."""

    config: Any

    @property
    def lm_head(self) -> Any: ...

    @property
    def head_weight(self) -> Tensor:
        """The head's rows of the output vocabulary, [V, D]."""

    def encode(self, encoder: EncoderInput) -> Tensor:
        """What answers read of the users' inputs, float [B, L, D]: states, or of a prompted model
        keys and values."""


class SearchState(Protocol):
    """A running search, whatever the model."""

    start_token: Tensor
    """int64 [1], what the first output follows."""

    def start(self, prefix_P: Tensor) -> Tensor:
        """Decode the tokens that every beam of every user begins with; returns the states after
        each, float [B, P, D]."""

    def step(self, tokens_BK: Tensor, open_BK: Tensor | None = None) -> Tensor:
        """Decode one token per beam; returns the states after it, float [B, K, D]. `open_BK`: bool,
        beams whose state is asked for, others may get any; None: all."""

    def reorder_beams(self, parent_BK: Tensor) -> None:
        """Let each beam continue the beam `parent_BK` names; the number of beams may change."""

    def fork(self, parent_BK: Tensor) -> SearchState:
        """Another search from here, as after `reorder_beams`; this one stays as it is."""


def start_search(
    model: Searchable, memory_BLD: Tensor, mask_BL: Tensor, *, static: bool = False
) -> SearchState:
    """The search of a model's answers to what it has encoded; arguments as of `DecoderState`."""
    if isinstance(model, BartNetwork):
        return DecoderState(model, memory_BLD, mask_BL, static=static)
    # Here: BART alone needs nothing of transformers.
    from genrec_dist.decoding.prompt_state import PromptState
    from genrec_dist.decoding.t5_state import T5State
    from genrec_dist.model.causal.prompted import PromptedModel
    from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration

    if isinstance(model, GenRecT5ForConditionalGeneration):
        return T5State(model, memory_BLD, mask_BL)
    assert isinstance(model, PromptedModel)
    return PromptState(model, memory_BLD, mask_BL)


class DecoderState(BeamCaches):
    """Keys and values of a search: the encoder's and those of the prefix once per user, the rest
    once per beam.

    The beams of a user are query rows over one set of encoder keys, so 20 beams read it once
    (EL-attention, arXiv 2105.04779). Shapes depend on sizes alone and nothing waits for the device:
    a search can be captured in a graph.
    """

    def __init__(
        self,
        model: BartNetwork,
        memory_BLD: Tensor,
        mask_BL: Tensor,
        *,
        static: bool = False,
    ):
        """Project the encoder's states.

        Args:
            model: Whose decoder it is.
            memory_BLD: Encoder states.
            mask_BL: bool, False on padding.
            static: Project padding too, whose amount is a value; otherwise real tokens alone.
        """
        self.model = model
        self.mask_B11L = mask_BL[:, None, None]
        start, device = model.config.decoder_start_token_id, memory_BLD.device
        self.start_token = torch.full((1,), start, dtype=torch.long, device=device)
        with_state = model.config.decoder_start != "mask"
        self.start_BD = model.masked_states(memory_BLD, mask_BL) if with_state else None
        self.every_state = model.config.decoder_start == "every-state"
        real_n = None if static else mask_BL.flatten().nonzero()[:, 0]
        if real_n is not None and len(real_n) == mask_BL.numel():
            real_n = None
        states = memory_BLD if real_n is None else memory_BLD.flatten(0, 1)[real_n]

        def spread(projected: Tensor) -> Tensor:
            if real_n is None:
                return projected
            # Under autocast the projection's type is not that of what it projects.
            spread_nD = projected.new_zeros(memory_BLD.shape).flatten(0, 1)
            return spread_nD.index_copy_(0, real_n, projected).view(memory_BLD.shape)

        self.cross: list[tuple[Tensor, Tensor]] = []
        """Keys and values [B, H, L, D / H] of each layer."""
        for attention in (layer.encoder_attn for layer in model.model.decoder.layers):
            keys, values = spread(attention.k_proj(states)), spread(attention.v_proj(states))
            self.cross.append((_heads(attention, keys), _heads(attention, values)))
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """[B, H, P, D / H] of each layer."""
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(self.cross)
        """[B, K, H, tokens since the prefix, D / H] of each layer."""
        self.num_tokens = 0

    def start(self, prefix_P: Tensor) -> Tensor:
        """Decode the tokens that every beam of every user begins with; returns decoder states after
        each, float [B, P, D]."""
        hidden_BPD = self._embed(prefix_P, self.start_BD).expand(len(self.mask_B11L), -1, -1)
        for number, layer in enumerate(self.model.model.decoder.layers):
            attention = layer.self_attn
            query, keys, values = (
                _heads(attention, project(hidden_BPD))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            self.prefix.append((keys, values))
            mixed = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=attention.scaling
            )
            hidden_BPD = self._finish_layer(layer, number, hidden_BPD, _joined(mixed))
        self.num_tokens = len(prefix_P)
        return hidden_BPD

    def step(self, tokens_BK: Tensor, open_BK: Tensor | None = None) -> Tensor:
        """Decode one token per beam, open or not; returns the decoder states after it, float
        [B, K, D]."""
        hidden_BKD = self._embed(tokens_BK, self.start_BD if self.every_state else None)
        for number, layer in enumerate(self.model.model.decoder.layers):
            mixed_BKD = self._attend_self(layer.self_attn, number, hidden_BKD)
            hidden_BKD = self._finish_layer(layer, number, hidden_BKD, mixed_BKD)
        self.num_tokens += 1
        return hidden_BKD

    def _embed(self, tokens: Tensor, start_BD: Tensor | None = None) -> Tensor:
        """Tokens [P] of one position each, or [B, K] all of one position. `start_BD`: added to the
        first of the P, or to all tokens where the model's state is in every input."""
        decoder = self.model.model.decoder
        first = POSITION_OFFSET + self.num_tokens
        last = first + (len(tokens) if tokens.dim() == 1 else 1)
        embedded = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[first:last]
        if start_BD is not None and self.every_state:
            embedded = embedded + start_BD[:, None]
        elif start_BD is not None:
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
        """Over the shared prefix and a beam's own tokens."""
        query_BKHd, key, value = (
            project(hidden_BKD).unflatten(-1, (attention.num_heads, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        own = self.add_own(number, key, value)
        return attend_beams(query_BKHd, self.prefix[number], own, attention.scaling)


def _heads(attention: BartAttention, states: Tensor) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _joined(mixed: Tensor) -> Tensor:
    """[B, H, L, D / H] -> [B, L, D]."""
    return mixed.transpose(1, 2).flatten(2)
