"""What decoding is measured on: a catalogue spelled as BART spells Beauty's, typical users, and a
model that can spell."""

# B users, L input tokens, T target tokens, D width, V vocabulary, S sub-words that are learned

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from genrec_shards.sequences import Sequences
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartAttention

from genrec_dist.config.recipe import Model
from genrec_dist.data.batch import IGNORED
from genrec_dist.data.collate import target_batch
from genrec_dist.data.encoder_input import EncoderInput, Layout, encode_histories, ragged
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.searcher import TopItems, TrieSearcher
from genrec_dist.decoding.trie import Trie, build_trie
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration

VOCABULARY = 50_265
"""BART's, with its special tokens in their places."""
BOS, PAD, EOS, MASK = 0, 1, 2, 50_264
FIRST_PIECE = 4
MOST_TOKENS = 512
SPELLERS, OTHERS_SAMPLED = 16, 2000
"""Users and tokens outside all words that the spelling is trained with."""


@dataclass(frozen=True)
class Shape:
    """A model that is decoded with, and for how many users at once."""

    name: str
    d_model: int
    layers: int
    """Of the encoder and of the decoder."""
    heads: int
    ffn: int
    batches: tuple[int, ...]
    headline: int
    """The batch whose ratios are claimed."""
    exact_goal: float
    compact_goal: float | None
    spelling_steps: int = 150
    """Training steps of `teach_spelling`."""


@dataclass(frozen=True)
class Users:
    """Histories by user row: items int32 [total] rows, offsets int64 [U + 1]."""

    items: np.ndarray
    offsets: np.ndarray


def users_of(sequences: Sequences, num_items: int) -> Users:
    """The test histories. Raises ValueError for a catalogue of another size than the one that is
    spelled."""
    if sequences.num_items > num_items:
        raise ValueError(
            f"{sequences.num_items} items in the data, {num_items} in the benchmark: give Beauty's size or less"
        )
    view = sequences.history_and_target("test")
    flat, offsets = ragged(view.starts, view.ends - view.starts)
    return Users(view.items[flat], offsets)


def make_users(num_users: int, num_items: int, seed: int = 0) -> Users:
    """Histories of 4 items and more, 8 in the mean; the popularity of rank r falls as 1 / r."""
    dice = np.random.default_rng(seed)
    lengths = 3 + dice.geometric(1 / 5, num_users)
    items = np.exp(dice.random(lengths.sum()) * np.log(num_items)).astype(np.int32) - 1
    return Users(items, np.concatenate([[0], np.cumsum(lengths)]))


def spell(
    codes: np.ndarray, stem: tuple[int, int], pieces: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [total], offsets int64 [N + 1]) of ` item_CODE` as BART's tokenizer cuts it: `
    item`, `_`, then the code's digits in groups of three from the right. Codes int64 [N], 1 to
    999,999,999; pieces [1100]: tokens of `1` to `999`, then of `000` to `099`, which stand behind
    another group alone."""
    num_groups = 1 + (codes >= 1000) + (codes >= 1_000_000)
    columns, present = (
        [np.full(len(codes), token) for token in stem],
        [np.ones(len(codes), bool)] * 2,
    )
    for place in (2, 1, 0):
        group = codes // 1000**place % 1000
        leads = num_groups == place + 1
        columns.append(pieces[np.where(leads | (group >= 100), group, 1000 + group)])
        present.append(num_groups > place)
    kept = np.stack(present, axis=1)
    return np.stack(columns, axis=1)[kept].astype(np.int32), np.concatenate(
        [[0], np.cumsum(kept.sum(axis=1))]
    )


def make_words(num_items: int, num_users: int, seed: int = 0) -> WordTable:
    """Items and users with codes in a random order, spelled with tokens scattered over the
    vocabulary."""
    dice = np.random.default_rng(seed)
    tokens = dice.permutation(np.arange(FIRST_PIECE, MASK))[:1103]
    item, user, bar = (int(token) for token in tokens[:3])
    pieces = tokens[3:]
    parts = [
        (np.array([BOS, EOS, MASK], np.int32), np.arange(4)),
        spell(dice.permutation(num_items) + 1, (item, bar), pieces),
        spell(dice.permutation(num_users) + 1, (user, bar), pieces),
    ]
    lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return WordTable(
        np.concatenate([tokens for tokens, _ in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        num_masks=1,
        num_items=num_items,
        num_users=num_users,
    )


class World:
    """A model with random weights, a catalogue, and users to decode."""

    def __init__(self, shape: Shape, users: Users, num_items: int, device: torch.device):
        self.shape, self.users, self.device = shape, users, device
        num_users = len(users.offsets) - 1
        self.words = make_words(num_items, num_users)
        self.layout = Layout(
            self.words, PAD, max_tokens=MOST_TOKENS, user_ids=True, positions="from-start"
        )
        self.trie = build_trie(*self.words.tokens_of_items())
        self.model = make_model(shape, self.words).to(device)
        item_tokens = self.words.lengths[self.words.item_words(users.items)]
        self.tokens_U = np.add.reduceat(item_tokens, users.offsets[:-1])
        """Sub-words of each history."""
        self._teach_spelling()
        self.searcher = TrieSearcher(self.model, self.trie, device)

    def batch(self, size: int) -> tuple[EncoderInput, tuple[np.ndarray, np.ndarray]]:
        """(encoder input padded to its longest history, (user index, item row) pairs of the
        histories) of typical users."""
        rows_B = self.typical_users(size)
        lengths_B = np.diff(self.users.offsets)[rows_B]
        flat, offsets = ragged(self.users.offsets[rows_B], lengths_B)
        items = self.users.items[flat]
        encoder = encode_histories(items, offsets, rows_B, self.layout).to(self.device)
        return encoder, (np.repeat(np.arange(size), lengths_B), items)

    def _teach_spelling(self) -> None:
        short = np.argsort(self.tokens_U, kind="stable")[len(self.tokens_U) // 4 :][:SPELLERS]
        lengths_B = np.diff(self.users.offsets)[short]
        flat, offsets = ragged(self.users.offsets[short], lengths_B)
        encoder = encode_histories(self.users.items[flat], offsets, short, self.layout).to(
            self.device
        )
        teach_spelling(
            self.model, encoder, self.users.items, self.layout, self.shape.spelling_steps
        )

    def typical_users(self, size: int) -> np.ndarray:
        """User rows int64 [B] of that one of 101 random batches whose padding is the median: a
        batch of a dozen can be padded to 40 sub-words or to 180, as chance has it, and `generate`
        suffers most from the longer one."""
        dice = np.random.default_rng(size)
        num_users = len(self.tokens_U)
        draws = [dice.choice(num_users, size, replace=size > num_users) for _ in range(101)]
        return draws[
            np.argsort([self.tokens_U[rows_B].max() for rows_B in draws], kind="stable")[50]
        ]


def make_model(shape: Shape, words: WordTable) -> GenRecForConditionalGeneration:
    """Random weights, small enough beside the residual stream that a state tells its place in the
    word."""
    torch.manual_seed(0)
    recipe = Model(
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        heads=shape.heads,
        ffn=shape.ffn,
        max_tokens=MOST_TOKENS,
        init_std=0.6 / shape.d_model**0.5,
    )
    model = build_model(
        recipe,
        ModelSizes(
            vocab_size=VOCABULARY,
            num_users=words.num_users,
            num_items=words.num_items,
            num_masks=1,
            special={"bos": BOS, "pad": PAD, "eos": EOS, "mask": MASK},
        ),
    )
    return model.eval()


def teach_spelling(
    model: GenRecForConditionalGeneration,
    encoder: EncoderInput,
    targets: np.ndarray,
    layout: Layout,
    steps: int,
    seed: int = 0,
) -> None:
    """Train the last decoder layer and the embeddings of the words' sub-words for some steps on
    items [n] drawn anew each step.

    By random weights no word is likely: the beams spread over first groups of digits below which
    nothing lies, most of them are gone before the last step, and `</s>` is nowhere expected. A
    trained model keeps its beams on the 12 groups below which eleven twelfths of Beauty's items
    lie, and is sure of `</s>` behind an item; a search is measured as it will be used. The softmax
    is that of the sub-words and a sample of the others, weighted to stand for all."""
    device, weight_VD = model.device, model.lm_head.weight
    dice, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    spelled = torch.from_numpy(np.append(np.unique(layout.words.tokens_of_items()[0]), EOS)).long()
    others = (
        torch.ones(len(weight_VD), dtype=torch.bool).index_fill(0, spelled, False).nonzero()[:, 0]
    )
    some = others[torch.randperm(len(others), generator=generator)[:OTHERS_SAMPLED]].to(device)
    weighted = torch.zeros(len(spelled) + len(some), device=device)
    weighted[len(spelled) :] = float(np.log(len(others) / len(some)))
    column = (
        torch.full((len(weight_VD),), -1)
        .index_copy(0, spelled, torch.arange(len(spelled)))
        .to(device)
    )
    spelled = spelled.to(device)
    model.requires_grad_(False)
    learned_SD = weight_VD[spelled].clone().requires_grad_()
    layer = model.model.decoder.layers[-1].requires_grad_()
    optimizer = torch.optim.AdamW(
        [learned_SD, *layer.parameters()], betas=(0.9, 0.98), weight_decay=0.0
    )
    memory_BLD = model.encode(encoder)
    for step in range(steps):
        rate = (
            min(3e-3, 0.4 / model.config.d_model) * min(1.0, (step + 1) / 10) * (1 - step / steps)
        )
        optimizer.param_groups[0]["lr"] = rate
        batch = target_batch(encoder, dice.choice(targets, len(memory_BLD)), layout).to(device)
        hidden_BTD = model.decode(batch.decoder_input_ids, memory_BLD, encoder.attention_mask)
        learned_BT = batch.labels != IGNORED
        logits_nS = hidden_BTD[learned_BT] @ torch.cat([learned_SD, weight_VD[some]]).T + weighted
        F.cross_entropy(logits_nS, column[batch.labels[learned_BT]]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            weight_VD[spelled] = learned_SD
    model.requires_grad_(False)


NOTHING = float("-inf")


class PlainState:
    """Keys and values of a running beam: the encoder's once a user, the decoder's own once a
    beam."""

    def __init__(
        self, model: GenRecForConditionalGeneration, memory_BLD: Tensor, memory_mask_BL: Tensor
    ):
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
            hidden_BKD = layer.self_attn_layer_norm(
                hidden_BKD + self._attend_self(layer.self_attn, hidden_BKD, number)
            )
            crossed_BKD = self._attend_memory(layer.encoder_attn, hidden_BKD, number)
            hidden_BKD = layer.encoder_attn_layer_norm(hidden_BKD + crossed_BKD)
            widened = layer.fc2(layer.activation_fn(layer.fc1(hidden_BKD)))
            hidden_BKD = layer.final_layer_norm(hidden_BKD + widened)
        self.num_tokens += 1
        return hidden_BKD

    def reorder(self, parent_BK: Tensor) -> None:
        """Let each beam continue the beam `parent_BK` names; the number of beams may change."""
        rows_B1 = torch.arange(len(parent_BK), device=parent_BK.device)[:, None]
        self.own = [
            pair and (pair[0][rows_B1, parent_BK], pair[1][rows_B1, parent_BK]) for pair in self.own
        ]

    def _attend_self(self, attention: BartAttention, hidden_BKD: Tensor, number: int) -> Tensor:
        shape = hidden_BKD.shape
        rows = hidden_BKD.reshape(-1, 1, shape[-1])
        query, key, value = (
            _heads(attention, project(rows))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
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
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_B11L, scale=attention.scaling
        )
        return attention.out_proj(mixed.transpose(1, 2).reshape(hidden_BKD.shape))


def _heads(attention: BartAttention, states: Tensor) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


class PlainSearcher:
    """A trie on a device, ready to decode batches of users with one model."""

    def __init__(
        self, model: GenRecForConditionalGeneration, trie: Trie, device: torch.device | str = "cpu"
    ):
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
        """The best `top` items a user by log-probability under the full softmax, as `TrieSearcher`
        in mode `exact`."""
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
            ends_BK = scores_BK + (
                logits_BKV[..., self.model.config.eos_token_id] - norm_BK1[..., 0]
            )
            ends_BK = ends_BK.masked_fill(self.end_item[nodes_BK] < 0, NOTHING)
            found_scores_BN = torch.cat([found_scores_BN, ends_BK], 1)
            found_nodes_BN = torch.cat([found_nodes_BN, nodes_BK], 1)
            found_scores_BN, places_BN = _best(found_scores_BN, found_nodes_BN, top)
            found_nodes_BN = found_nodes_BN.gather(1, places_BN)
            if level == self.trie.depth:
                break
            scores_BK, nodes_BK, parent_BK = self._grow(
                logits_BKV, norm_BK1, scores_BK, nodes_BK, level, beam
            )
            num_open = _num_open(scores_BK, found_scores_BN, top)
            if num_open == 0:
                break
            scores_BK, nodes_BK = scores_BK[:, :num_open], nodes_BK[:, :num_open]
            state.reorder(parent_BK[:, :num_open])
            tokens_BK = self.token[nodes_BK].clamp(min=0)
        return self._lists(found_scores_BN, self.end_item[found_nodes_BN], top)

    def _grow(
        self,
        logits_BKV: Tensor,
        norm_BK1: Tensor,
        scores_BK: Tensor,
        nodes_BK: Tensor,
        level: int,
        beam: int,
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
