"""The running search of a T5: as `DecoderState`, with T5's layers and relative positions."""

# B users, K beams, H heads, L input tokens, P prefix tokens, t tokens of a beam since then, d width
# of a head, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.decoding.beam_caches import BeamCaches, attend_beams
from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration


class T5State(BeamCaches):
    """Keys and values of a search: the encoder's and those of the prefix once per user, the rest
    once per beam.

    Scores get a bias by the distance of two tokens. All beams of a step have the same length, so it
    is one row for all of them, whichever beam a beam continues."""

    def __init__(
        self, model: GenRecT5ForConditionalGeneration, memory_BLD: Tensor, mask_BL: Tensor
    ):
        """Project the encoder's states; arguments are those of `DecoderState`."""
        self.model, self.mask_B11L = model, mask_BL[:, None, None]
        start, device = model.config.decoder_start_token_id, memory_BLD.device
        self.start_token = torch.full((1,), start, dtype=torch.long, device=device)
        with_state = model.config.decoder_start == "state"
        self.start_BD = model.masked_states(memory_BLD, mask_BL) if with_state else None
        blocks: Any = model.decoder.block
        self.layers = [tuple(block.layer) for block in blocks]
        """(self-attention, cross-attention, feed-forward) of each layer, with their norms."""
        self.cross: list[tuple[Tensor, Tensor]] = []
        """Keys and values [B, H, L, d] of each layer."""
        for _, cross, _ in self.layers:
            attention = cross.EncDecAttention
            keys, values = attention.k(memory_BLD), attention.v(memory_BLD)
            self.cross.append((self._heads(keys), self._heads(values)))
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """[B, H, P, d] of each layer."""
        self.own = [None] * len(self.layers)
        self.num_tokens = 0

    def start(self, prefix_P: Tensor) -> Tensor:
        """Decode the tokens that every beam of every user begins with; returns decoder states after
        each, float [B, P, D]."""
        num_users, num_tokens = len(self.mask_B11L), len(prefix_P)
        hidden_BPD = self.model.shared(prefix_P).expand(num_users, -1, -1)
        if self.start_BD is not None:
            first_B1D = hidden_BPD[:, :1] + self.start_BD[:, None]
            hidden_BPD = torch.cat([first_B1D, hidden_BPD[:, 1:]], 1)
        places_P = torch.arange(num_tokens, device=prefix_P.device)
        later_PP = places_P > places_P[:, None]
        bias_1HPP = self._bias(num_tokens).masked_fill(later_PP, float("-inf"))
        for number, layer in enumerate(self.layers):
            attention, low_BPD = layer[0].SelfAttention, layer[0].layer_norm(hidden_BPD)
            query, keys, values = (
                self._heads(project(low_BPD)) for project in (attention.q, attention.k, attention.v)
            )
            self.prefix.append((keys, values))
            mixed_BHPd = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=bias_1HPP.to(query.dtype), scale=attention.scaling
            )
            mixed_BPD = mixed_BHPd.transpose(1, 2).flatten(2)
            hidden_BPD = self._finish_layer(number, hidden_BPD, mixed_BPD)
        self.num_tokens = num_tokens
        return self._for_head(hidden_BPD)

    def step(self, tokens_BK: Tensor, open_BK: Tensor | None = None) -> Tensor:
        """Decode one token per beam, open or not; returns the decoder states after it, float
        [B, K, D]."""
        hidden_BKD = self.model.shared(tokens_BK)
        bias_Ht = self._bias(1)[0, :, 0]
        for number, layer in enumerate(self.layers):
            attention, low_BKD = layer[0].SelfAttention, layer[0].layer_norm(hidden_BKD)
            query_BKHd, key, value = (
                project(low_BKD).unflatten(-1, (attention.n_heads, attention.key_value_proj_dim))
                for project in (attention.q, attention.k, attention.v)
            )
            own = self.add_own(number, key, value)
            mixed_BKD = attend_beams(
                query_BKHd, self.prefix[number], own, attention.scaling, bias_Ht.to(key.dtype)
            )
            hidden_BKD = self._finish_layer(number, hidden_BKD, mixed_BKD)
        self.num_tokens += 1
        return self._for_head(hidden_BKD)

    def _bias(self, num_queries: int) -> Tensor:
        """Of the next tokens over themselves and all before, [1, H, queries, tokens]; it is the
        first layer's for all of them."""
        bias: Tensor = self.layers[0][0].SelfAttention.compute_bias(
            num_queries, self.num_tokens + num_queries, past_seen_tokens=self.num_tokens
        )
        return bias

    def _heads(self, states_BLE: Tensor) -> Tensor:
        """[B, L, H d] -> [B, H, L, d]."""
        return states_BLE.unflatten(-1, (-1, self.model.config.d_kv)).transpose(1, 2)

    def _finish_layer(self, number: int, hidden_BKD: Tensor, mixed_BKD: Tensor) -> Tensor:
        """The layer after its self-attention has mixed values."""
        own, cross, feed_forward = self.layers[number]
        hidden_BKD = hidden_BKD + own.SelfAttention.o(mixed_BKD)
        attention = cross.EncDecAttention
        query = self._heads(attention.q(cross.layer_norm(hidden_BKD)))
        mixed = F.scaled_dot_product_attention(
            query, *self.cross[number], attn_mask=self.mask_B11L, scale=attention.scaling
        )
        hidden_BKD = hidden_BKD + attention.o(mixed.transpose(1, 2).flatten(2))
        finished_BKD: Tensor = feed_forward(hidden_BKD)
        return finished_BKD

    def _for_head(self, hidden_BKD: Tensor) -> Tensor:
        return self.model.for_head(self.model.decoder.final_layer_norm(hidden_BKD))
