"""The running search of a prompted model: a prompt's keys and values once per user, shared by all
beams."""

# B users, K beams, H query heads, G key and value heads, R = H / G, L prompt tokens, P tokens that
# answers share, t tokens of a beam since then, d width of a head, D width, W as in PromptedModel

from __future__ import annotations

import torch
from torch import Tensor

from genrec_dist.decoding.beam_caches import BeamCaches
from genrec_dist.model.causal.attention import AttentionCall, per_query_head
from genrec_dist.model.causal.packed_rows import PackedRows
from genrec_dist.model.causal.prompted import PromptedModel


class PromptState(BeamCaches):
    """Takes the place of `DecoderState`: what that reads from an encoder is here a prompt's keys
    and values.

    The open beams of all users are the tokens of a pass through the layers: each sees the keys that
    its user's beams share and its own.
    """

    def __init__(self, model: PromptedModel, memory_BLW: Tensor, mask_BL: Tensor):
        """Start after the prompts.

        Args:
            model: whose answers are searched.
            memory_BLW: of `PromptedModel.encode`.
            mask_BL: bool, False on padding.
        """
        tail = torch.tensor(model.config.tail_tokens, device=memory_BLW.device)
        # The output after the tail's last token is the first that counts.
        self.model, self.lead, self.start_token = model, tail[:-1], tail[-1:]
        self.memory, self.mask_BL = model.memory_shape(memory_BLW), mask_BL
        self.next_B = mask_BL.sum(1)
        """Position of the next token."""
        self.shared: list[tuple[Tensor, Tensor]] = []
        """Keys and values [B, G, L + P, d] of each layer."""
        self.seen_B11L = mask_BL[:, None, None]
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(self.memory)
        """[B, K, G, t, d] of each layer."""

    def start(self, prefix_P: Tensor) -> Tensor:
        """Read the prompt's tail and the tokens that every answer begins with; returns the states
        after the latter, float [B, P, D]."""
        tokens_P = torch.cat([self.lead, prefix_P])
        steps_P = torch.arange(len(tokens_P), device=tokens_P.device)
        num_users = len(self.mask_BL)
        states_BPD = self.model.run(
            tokens_P.expand(num_users, -1),
            self.next_B[:, None] + steps_P,
            _SharedAttention(self, steps_P <= steps_P[:, None]),
        )
        self.next_B = self.next_B + len(tokens_P)
        shown_BP = self.mask_BL.new_ones(num_users, len(tokens_P))
        self.seen_B11L = torch.cat([self.mask_BL, shown_BP], 1)[:, None, None]
        return states_BPD[:, len(self.lead) :]

    def step(self, tokens_BK: Tensor, open_BK: Tensor | None = None) -> Tensor:
        """Read one token per open beam; returns the states after it, float [B, K, D], any of the
        beams that are not open."""
        rows = PackedRows.of(tokens_BK >= 0 if open_BK is None else open_BK)
        positions_BK = self.next_B[:, None].expand(tokens_BK.shape)
        states_1nD = self.model.run(
            rows.pack(tokens_BK)[None], rows.pack(positions_BK)[None], _BeamAttention(self, rows)
        )
        self.next_B = self.next_B + 1
        return rows.unpack(states_1nD[0])


class _SharedAttention:
    """Of tokens that all answers of a user share, over the prompt and the ones before; appends
    their keys and values to the prompt's."""

    def __init__(self, state: PromptState, causal_PP: Tensor):
        self.state = state
        num_users, mask_BL = len(state.mask_BL), state.mask_BL
        seen_BPL = mask_BL[:, None].expand(-1, len(causal_PP), -1)
        self.seen_B1PL = torch.cat([seen_BPL, causal_PP.expand(num_users, -1, -1)], 2)[:, None]

    def mix(self, call: AttentionCall) -> Tensor:
        assert call.layer == len(self.state.shared), "layers out of order"
        memory = self.state.memory[call.layer].to(call.key_BGSd.dtype)
        keys, values = (
            torch.cat([before, after], 2)
            for before, after in zip(memory, (call.key_BGSd, call.value_BGSd), strict=True)
        )
        self.state.shared.append((keys, values))
        query_BHSd = call.query_BHSd
        keys, values = per_query_head(keys, query_BHSd), per_query_head(values, query_BHSd)
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHSd, keys, values, attn_mask=self.seen_B1PL, scale=call.scale
        )


class _BeamAttention:
    """Of one token per beam, over the shared keys and the beam's own: one softmax over both."""

    def __init__(self, state: PromptState, rows: PackedRows):
        self.state, self.rows = state, rows
        self.hidden_B11L = ~state.seen_B11L

    def mix(self, call: AttentionCall) -> Tensor:
        state, layer, heads = self.state, call.layer, call.key_BGSd.shape[1]
        query_BKHd, *one = call.unpacked(self.rows)
        keys, values = state.add_own(layer, *one)
        shared_keys, shared_values = state.shared[layer]
        # The query heads that share keys, of all beams, are rows of one product.
        query_BGRKd = (query_BKHd * call.scale).transpose(1, 2).unflatten(1, (heads, -1))
        on_shared = query_BGRKd.flatten(2, 3) @ shared_keys.transpose(2, 3)
        on_shared = on_shared.masked_fill_(self.hidden_B11L, float("-inf"))
        on_shared = on_shared.unflatten(2, query_BGRKd.shape[2:4])  # [B, G, R, K, L + P]
        query_BKGRd = query_BGRKd.permute(0, 3, 1, 2, 4)
        on_own = (query_BKGRd @ keys.transpose(3, 4)).permute(0, 2, 3, 1, 4)  # [B, G, R, K, t]
        weights = torch.cat([on_shared, on_own], -1).softmax(-1)
        num_shared = shared_keys.shape[2]
        from_shared = weights[..., :num_shared].flatten(2, 3) @ shared_values
        from_own = weights[..., num_shared:].permute(0, 3, 1, 2, 4) @ values  # [B, K, G, R, d]
        mixed = from_shared.unflatten(2, query_BGRKd.shape[2:4]) + from_own.permute(0, 2, 3, 1, 4)
        mixed_BKHd = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)
        return self.rows.pack(mixed_BKHd).transpose(0, 1)[None]
