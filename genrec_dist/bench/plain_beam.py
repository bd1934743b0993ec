"""A peer: the plain constrained beam of the first release, step by step with a whole softmax a beam; no exclusion."""

# B users, K beams, C children, H heads, L input tokens, D width, V vocabulary, N list

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartAttention

from genrec_dist.beam import TopItems
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.text import EncoderInput
from genrec_dist.trie import Trie

NOTHING = float("-inf")


class PlainState:
    """Keys and values of a running beam: the encoder's once a user, the decoder's own once a beam."""

    def __init__(self, model: GenRecForConditionalGeneration, memory_BLD: Tensor, memory_mask_BL: Tensor):
        self.model = model
        self.mask_B11L = memory_mask_BL[:, None, None]
        self.cross = [
            (
                _heads(layer.encoder_attn, layer.encoder_attn.k_proj(memory_BLD)),
                _heads(layer.encoder_attn, layer.encoder_attn.v_proj(memory_BLD)),
            )
            for layer in model.model.decoder.layers
        ]
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * len(self.cross)
        self.num_tokens = 0

    def step(self, tokens_BK: Tensor) -> Tensor:
        """Take one token a beam in and give the decoder states behind it, float [B, K, D]."""
        decoder = self.model.model.decoder
        position = torch.full_like(tokens_BK[:1, :1], self.num_tokens)
        position_1D = decoder.embed_positions(tokens_BK[:1, :1], position_ids=position[0])[0]
        hidden_BKD = decoder.layernorm_embedding(decoder.embed_tokens(tokens_BK) + position_1D)
        for number, layer in enumerate(decoder.layers):
            hidden_BKD = layer.self_attn_layer_norm(hidden_BKD + self._attend_self(layer.self_attn, hidden_BKD, number))
            crossed_BKD = self._attend_memory(layer.encoder_attn, hidden_BKD, number)
            hidden_BKD = layer.encoder_attn_layer_norm(hidden_BKD + crossed_BKD)
            widened = layer.fc2(layer.activation_fn(layer.fc1(hidden_BKD)))
            hidden_BKD = layer.final_layer_norm(hidden_BKD + widened)
        self.num_tokens += 1
        return hidden_BKD

    def reorder(self, parent_BK: Tensor) -> None:
        """Let each beam continue the beam `parent_BK` names; the number of beams may change."""
        rows_B1 = torch.arange(len(parent_BK), device=parent_BK.device)[:, None]
        self.own = [pair and (pair[0][rows_B1, parent_BK], pair[1][rows_B1, parent_BK]) for pair in self.own]

    def _attend_self(self, attention: BartAttention, hidden_BKD: Tensor, number: int) -> Tensor:
        shape = hidden_BKD.shape
        rows = hidden_BKD.reshape(-1, 1, shape[-1])
        query, key, value = (
            _heads(attention, project(rows)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        past = self.own[number]
        if past is not None:
            key = torch.cat([past[0].flatten(0, 1), key], dim=2)
            value = torch.cat([past[1].flatten(0, 1), value], dim=2)
        self.own[number] = (key.unflatten(0, shape[:2]), value.unflatten(0, shape[:2]))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        return attention.out_proj(mixed.transpose(1, 2).reshape(shape))

    def _attend_memory(self, attention: BartAttention, hidden_BKD: Tensor, number: int) -> Tensor:
        key, value = self.cross[number]
        query = _heads(attention, attention.q_proj(hidden_BKD))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B11L, scale=attention.scaling)
        return attention.out_proj(mixed.transpose(1, 2).reshape(hidden_BKD.shape))


def _heads(attention: BartAttention, states: Tensor) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


class PlainSearcher:
    """A trie on a device, ready to decode batches of users with one model."""

    def __init__(self, model: GenRecForConditionalGeneration, trie: Trie, device: torch.device | str = "cpu"):
        self.model, self.trie, self.device = model, trie, torch.device(device)
        self.token = self._move(trie.token.astype(np.int64))
        self.first_child = self._move(trie.first_child)
        self.num_children = self._move(trie.num_children)
        self.end_item = self._move(trie.end_item.astype(np.int64))
        self.fans = [trie.widest_fan(level) for level in range(trie.depth + 1)]

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @torch.inference_mode()
    def search(self, encoder: EncoderInput, *, beam: int, top: int) -> TopItems:
        """The best `top` items a user by log-probability under the full softmax, as `TrieSearcher` in mode `exact`."""
        beam = max(beam, top)
        memory_BLD = self.model.encode(encoder)
        state = PlainState(self.model, memory_BLD, encoder.attention_mask)
        nodes_BK = torch.zeros(len(memory_BLD), 1, dtype=torch.long, device=self.device)
        scores_BK = torch.zeros(nodes_BK.shape, device=self.device, dtype=self.model.dtype)
        tokens_BK = torch.full_like(nodes_BK, self.model.config.decoder_start_token_id)
        found_scores_BN, found_nodes_BN = scores_BK[:, :0], nodes_BK[:, :0]
        for level in range(self.trie.depth + 1):
            logits_BKV = self.model.lm_head(state.step(tokens_BK))
            norm_BK1 = logits_BKV.logsumexp(-1, keepdim=True)
            ends_BK = scores_BK + (logits_BKV[..., self.model.config.eos_token_id] - norm_BK1[..., 0])
            ends_BK = ends_BK.masked_fill(self.end_item[nodes_BK] < 0, NOTHING)
            found_scores_BN = torch.cat([found_scores_BN, ends_BK], 1)
            found_nodes_BN = torch.cat([found_nodes_BN, nodes_BK], 1)
            found_scores_BN, places_BN = _best(found_scores_BN, found_nodes_BN, top)
            found_nodes_BN = found_nodes_BN.gather(1, places_BN)
            if level == self.trie.depth:
                break
            scores_BK, nodes_BK, parent_BK = self._grow(logits_BKV, norm_BK1, scores_BK, nodes_BK, level, beam)
            num_open = _num_open(scores_BK, found_scores_BN, top)
            if num_open == 0:
                break
            scores_BK, nodes_BK = scores_BK[:, :num_open], nodes_BK[:, :num_open]
            state.reorder(parent_BK[:, :num_open])
            tokens_BK = self.token[nodes_BK].clamp(min=0)
        return self._lists(found_scores_BN, self.end_item[found_nodes_BN], top)

    def _grow(
        self, logits_BKV: Tensor, norm_BK1: Tensor, scores_BK: Tensor, nodes_BK: Tensor, level: int, beam: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best `beam` children of all beams: (scores, nodes, parent beams), each [B, K']."""
        columns_C = torch.arange(self.fans[level], device=self.device)
        exists_BKC = columns_C < self.num_children[nodes_BK][..., None]
        children_BKC = torch.where(exists_BKC, self.first_child[nodes_BK][..., None] + columns_C, 0)
        gained_BKC = logits_BKV.gather(2, self.token[children_BKC].clamp(min=0)) - norm_BK1
        reached_BKC = (scores_BK[..., None] + gained_BKC).masked_fill(~exists_BKC, NOTHING)
        children_BX = children_BKC.flatten(1)
        scores_BX, places_BX = _best(reached_BKC.flatten(1), children_BX, beam)
        return scores_BX, children_BX.gather(1, places_BX), places_BX // len(columns_C)

    def _lists(self, scores_BN: Tensor, items_BN: Tensor, top: int) -> TopItems:
        items_BN = items_BN.masked_fill(scores_BN == NOTHING, -1)
        missing = max(top - items_BN.shape[1], 0)
        items_BN = F.pad(items_BN, (0, missing), value=-1)
        scores_BN = F.pad(scores_BN, (0, missing), value=NOTHING)
        return TopItems(items_BN.cpu().numpy().astype(np.int32), scores_BN.float().cpu().numpy())


def _num_open(scores_BK: Tensor, found_scores_BN: Tensor, top: int) -> int:
    """Beams, best first, that can still change some user's list."""
    full = found_scores_BN.shape[1] == top
    open_BK = scores_BK > (found_scores_BN[:, -1:] if full else NOTHING)
    return int(open_BK.sum(dim=1).max())


def _best(scores_BX: Tensor, nodes_BX: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(scores, places) of the `count` highest scores a row, equal ones by smaller node."""
    count = min(count, scores_BX.shape[1])
    kept, places = scores_BX.topk(min(count + 1, scores_BX.shape[1]))
    if kept.shape[1] > count:
        tied = (kept[:, -1] == kept[:, -2]) & (kept[:, -1] > NOTHING)
        if tied.any():
            places = torch.arange(scores_BX.shape[1], device=places.device).expand_as(scores_BX)
            kept = scores_BX
        else:
            kept, places = kept[:, :count], places[:, :count]
    by_node = nodes_BX.gather(1, places).argsort(dim=1, stable=True)
    by_score = kept.gather(1, by_node).argsort(dim=1, descending=True, stable=True)
    order = by_node.gather(1, by_score)[:, :count]
    return kept.gather(1, order), places.gather(1, order)
