"""Constrained beam search over the item trie."""

# B users, K beams, C children, H heads, L input tokens, D width, V vocabulary, N list

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartAttention

from genrec_dist.batch import EncoderInput
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.trie import Trie, pruned

NOTHING = float("-inf")


@dataclass(frozen=True)
class TopItems:
    items: np.ndarray
    """int32 [B, N] item rows, best first; -1 where fewer items are left than asked for."""
    scores: np.ndarray
    """float32 [B, N] log-probabilities of the items' token strings, `</s>` included."""


class DecoderState:
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
        for number, pair in enumerate(self.own):
            assert pair is not None
            keys, values = (_take_beams(cached, parent_BK) for cached in pair)
            self.own[number] = (keys, values)

    def _attend_self(self, attention: BartAttention, hidden_BKD: Tensor, number: int) -> Tensor:
        # Each beam attends to its own past alone, so beams join the batch: [B * K, H, tokens, D / H].
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
        # All beams of a user are query rows over the user's one set of keys and values.
        key, value = self.cross[number]
        query = _heads(attention, attention.q_proj(hidden_BKD))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B11L, scale=attention.scaling)
        return attention.out_proj(mixed.transpose(1, 2).reshape(hidden_BKD.shape))


def _heads(attention: BartAttention, states: Tensor) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _take_beams(cached_BK: Tensor, parent_BK: Tensor) -> Tensor:
    rows_B1 = torch.arange(len(parent_BK), device=parent_BK.device)[:, None]
    return cached_BK[rows_B1, parent_BK]


class TrieSearcher:
    """A trie on a device, ready to decode batches of users with one model."""

    def __init__(self, model: GenRecForConditionalGeneration, trie: Trie, device: torch.device | str = "cpu"):
        self.model = model
        self.trie = trie
        self.device = torch.device(device)
        self.token = self._move(trie.token.astype(np.int64))
        self.first_child = self._move(trie.first_child)
        self.num_children = self._move(trie.num_children)
        self.end_item = self._move(trie.end_item.astype(np.int64))
        self.fans = [trie.widest_fan(level) for level in range(trie.depth + 1)]

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @torch.inference_mode()
    def search(
        self,
        encoder: EncoderInput,
        *,
        beam: int,
        top: int,
        excluded: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> TopItems:
        """The best `top` items a user by log-probability under the full softmax.

        `excluded`: (user index in the batch, item row) pairs that must not be listed. A beam narrower than `top` is widened
        to it. Ties go to the smaller node, that is to the smaller token ids.
        """
        beam = max(beam, top)
        memory_BLD = self.model.encode(encoder)
        state = DecoderState(self.model, memory_BLD, encoder.attention_mask)
        num_users = len(memory_BLD)
        dead_end_BM, dead_node_BM = self._dead(num_users, excluded)
        nodes_BK = torch.zeros(num_users, 1, dtype=torch.long, device=self.device)
        scores_BK = torch.zeros(num_users, 1, device=self.device, dtype=self.model.dtype)
        tokens_BK = torch.full_like(nodes_BK, self.model.config.decoder_start_token_id)
        found_scores_BN = scores_BK.new_full((num_users, 0), NOTHING)
        found_items_BN = nodes_BK.new_full((num_users, 0), -1)
        for level in range(self.trie.depth + 1):
            logprobs_BKV = self._logprobs(state.step(tokens_BK))
            ends_BK = self._end_scores(logprobs_BKV, scores_BK, nodes_BK, dead_end_BM)
            found_scores_BN, found_items_BN = _best(
                torch.cat([found_scores_BN, ends_BK], 1), torch.cat([found_items_BN, self.end_item[nodes_BK]], 1), top
            )
            if level == self.trie.depth:
                break
            scores_BK, nodes_BK, parent_BK = self._grow(
                logprobs_BKV, scores_BK, nodes_BK, dead_node_BM, self.fans[level], beam
            )
            state.reorder(parent_BK)
            tokens_BK = self.token[nodes_BK].clamp(min=0)
        return self._lists(found_scores_BN, found_items_BN, top)

    def _dead(
        self, num_users: int, excluded: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if excluded is None:
            return None, None
        dead_end_BM, dead_node_BM = pruned(self.trie, num_users, *excluded)
        return self._move(dead_end_BM), self._move(dead_node_BM)

    def _logprobs(self, hidden_BKD: Tensor) -> Tensor:
        logits_BKV = self.model.lm_head(hidden_BKD)
        return logits_BKV.to(self.model.dtype).log_softmax(-1)

    def _end_scores(
        self, logprobs_BKV: Tensor, scores_BK: Tensor, nodes_BK: Tensor, dead_end_BM: Tensor | None
    ) -> Tensor:
        """Scores of the items that end at the beams' nodes, -inf where none does."""
        ends_BK = scores_BK + logprobs_BKV[..., self.model.config.eos_token_id]
        closed_BK = self.end_item[nodes_BK] < 0
        if dead_end_BM is not None:
            closed_BK = closed_BK | dead_end_BM.gather(1, nodes_BK)
        return ends_BK.masked_fill(closed_BK, NOTHING)

    def _grow(
        self,
        logprobs_BKV: Tensor,
        scores_BK: Tensor,
        nodes_BK: Tensor,
        dead_node_BM: Tensor | None,
        fan: int,
        beam: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best `beam` children of all beams: (scores, nodes, parent beams), each [B, K']."""
        columns_C = torch.arange(fan, device=self.device)
        exists_BKC = columns_C < self.num_children[nodes_BK][..., None]
        children_BKC = torch.where(exists_BKC, self.first_child[nodes_BK][..., None] + columns_C, 0)
        gained_BKC = logprobs_BKV.gather(2, self.token[children_BKC].clamp(min=0))
        closed_BKC = ~exists_BKC
        if dead_node_BM is not None:
            closed_BKC = closed_BKC | dead_node_BM.gather(1, children_BKC.flatten(1)).view_as(children_BKC)
        reached_BKC = (scores_BK[..., None] + gained_BKC).masked_fill(closed_BKC, NOTHING)
        scores_BX, places_BX = reached_BKC.flatten(1).topk(min(beam, reached_BKC[0].numel()))
        return scores_BX, children_BKC.flatten(1).gather(1, places_BX), places_BX // fan

    def _lists(self, scores_BN: Tensor, items_BN: Tensor, top: int) -> TopItems:
        items_BN = items_BN.masked_fill(scores_BN == NOTHING, -1)
        missing = top - items_BN.shape[1]
        if missing > 0:
            items_BN = F.pad(items_BN, (0, missing), value=-1)
            scores_BN = F.pad(scores_BN, (0, missing), value=NOTHING)
        return TopItems(items_BN.cpu().numpy().astype(np.int32), scores_BN.float().cpu().numpy())


def _best(scores_BN: Tensor, items_BN: Tensor, top: int) -> tuple[Tensor, Tensor]:
    kept_scores, places = scores_BN.topk(min(top, scores_BN.shape[1]))
    return kept_scores, items_BN.gather(1, places)
