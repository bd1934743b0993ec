"""Small catalogues and brute force over all their items, which every search is held against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutput

from genrec_dist.config.recipe import Model
from genrec_dist.data.encoder_input import EncoderInput, Layout, encode_histories
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration

BOS, PAD, EOS, MASK, FIRST = 0, 1, 2, 4, 5

ALPHABET = 4

MOST_ITEMS, NUM_USERS = 60, 6

Word = tuple[int, ...]

History = list[int]

PREFIXES: list[Word] = [(5,), (5, 6), (5, 6, 6), (6,), (5, 6, 6, 6), (7, 7), (7, 7, 8, 8)]

catalogues = st.lists(
    st.lists(st.integers(FIRST, FIRST + ALPHABET - 1), min_size=1, max_size=4).map(tuple),
    min_size=2,
    max_size=MOST_ITEMS,
    unique=True,
)


@cache
def sharp_model(
    vocabulary: int = FIRST + ALPHABET, num_items: int = MOST_ITEMS
) -> GenRecForConditionalGeneration:
    """Random weights, large enough that scores lie far apart, in float64."""
    torch.manual_seed(3)
    shape = Model(
        d_model=16, encoder_layers=1, decoder_layers=2, heads=2, ffn=32, max_tokens=64, init_std=0.4
    )
    model = build_model(
        shape,
        ModelSizes(
            vocab_size=vocabulary,
            num_users=NUM_USERS,
            num_items=num_items,
            num_masks=1,
            special={"bos": BOS, "pad": PAD, "eos": EOS, "mask": MASK},
        ),
    )
    return model.double().eval()


@dataclass
class World:
    """A catalogue with a model that can speak it."""

    items: list[Word]
    model: GenRecForConditionalGeneration

    def __post_init__(self) -> None:
        users = [(FIRST, FIRST)] * NUM_USERS
        words: list[Word] = [(BOS,), (EOS,), (MASK,), *self.items, *users]
        tokens = np.array([token for word in words for token in word], np.int32)
        table = WordTable(tokens, np.cumsum([0, *map(len, words)]), 1, len(self.items), NUM_USERS)
        self.layout = Layout(table, PAD, max_tokens=64, user_ids=True, positions="from-start")
        self.searcher = TrieSearcher(self.model, build_trie(*table.tokens_of_items()))

    def encoder(self, histories: list[History], users: list[int] | None = None) -> EncoderInput:
        items = np.array([item for history in histories for item in history], np.int32)
        rows = np.arange(len(histories)) % NUM_USERS if users is None else np.array(users)
        return encode_histories(items, np.cumsum([0, *map(len, histories)]), rows, self.layout)

    def search(
        self,
        histories: list[History],
        *,
        exclude: bool = False,
        users: list[int] | None = None,
        **sizes: Any,
    ) -> list[list[tuple[int, float]]]:
        """(item, score) lists, checked for their form: distinct, sorted, -1 and -inf only at the
        end."""
        index = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        excluded = (index, np.array([item for history in histories for item in history], np.int32))
        found = self.searcher.search(
            self.encoder(histories, users), excluded=excluded if exclude else None, **sizes
        )  # fmt: skip
        assert found.items.shape == found.scores.shape == (len(histories), sizes["top"])
        assert found.items.dtype == np.int32
        assert found.scores.dtype == np.float32
        assert not np.isnan(found.scores).any()
        assert ((found.items >= 0) == np.isfinite(found.scores)).all()
        lists = []
        for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True):
            count = sum(item >= 0 for item in items)
            assert items[count:] == [-1] * (len(items) - count)
            assert len(set(items[:count])) == count
            assert max(items) < len(self.items)
            assert scores == sorted(scores, reverse=True)
            lists.append(list(zip(items[:count], scores[:count], strict=True)))
        return lists

    @torch.inference_mode()
    def brute_force(self, histories: list[History]) -> np.ndarray:
        """float64 [B, N]: log-probability of each item's tokens and `</s>`, by whole sequences
        through `decode`."""
        encoder = self.encoder(histories)
        memory = self.model.encode(encoder)
        longest = max(map(len, self.items)) + 1
        inputs = torch.tensor(
            [[MASK, *item, *[PAD] * (longest - 1 - len(item))] for item in self.items]
        )
        labels = torch.tensor(
            [[*item, EOS, *[-1] * (longest - 1 - len(item))] for item in self.items]
        )
        scores, copies = [], len(self.items)
        for row in range(len(histories)):
            start = None
            if self.model.config.decoder_start == "state":  # at [MASK], the last but </s>
                start = memory[
                    row, len(encoder.input_ids[row][encoder.attention_mask[row]]) - 2
                ].expand(copies, -1)
            hidden = self.model.decode(
                inputs,
                memory[row].expand(copies, -1, -1),
                encoder.attention_mask[row].expand(copies, -1),
                start,
            )
            logprobs = self.model.lm_head(hidden).log_softmax(-1)
            gained = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            scores.append(gained.masked_fill(labels < 0, 0.0).sum(1))
        return torch.stack(scores).numpy()

    @property
    def widest_level(self) -> int:
        return int(np.diff(self.searcher.trie.level_offsets).max())


def best_first(scores_N: np.ndarray, without: History) -> list[int]:
    return [int(item) for item in np.argsort(-scores_N, kind="stable") if item not in without]


histories_of = st.lists(st.lists(st.integers(0, 10**6), max_size=8), min_size=1, max_size=4)


def all_pairs() -> list[Word]:
    """56 items: `a b` and `a b c` of the alphabet, many of them prefixes of others."""
    letters = range(FIRST, FIRST + ALPHABET)
    return [(a, b) for a in letters for b in letters] + [
        (a, b, c) for a in letters for b in letters for c in letters if (a + b + c) % 8 < 5
    ]


def random_histories(world: World, count: int) -> list[History]:
    rng = np.random.default_rng(5)
    return [rng.permutation(len(world.items))[: rng.integers(0, 9)].tolist() for _ in range(count)]


def hugging_face(
    world: World, histories: list[History], beam: int
) -> list[tuple[list[int], list[float]]]:
    """(items, scores) a user as `generate` gives them, up to the first that is no item."""
    after: dict[Word, list[int]] = {}
    for item in world.items:
        whole = (*item, EOS)
        for n, token in enumerate(whole):
            after.setdefault(whole[:n], []).append(token)
    row_of = {item: row for row, item in enumerate(world.items)}
    encoder = world.encoder(histories)
    with torch.inference_mode():
        output = world.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=world.model.encode(encoder)),
            attention_mask=encoder.attention_mask.long(),
            prefix_allowed_tokens_fn=lambda _, ids: after.get(tuple(ids[1:].tolist()), [EOS]),
            decoder_start_token_id=MASK,
            num_beams=beam,
            num_return_sequences=beam,
            length_penalty=0.0,
            early_stopping="never",
            forced_bos_token_id=None,
            forced_eos_token_id=None,
            max_new_tokens=max(map(len, world.items)) + 2,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    users = []
    for row in range(len(histories)):
        items, scores = [], []
        for place in range(row * beam, (row + 1) * beam):
            tokens = tuple(t for t in output.sequences[place].tolist()[1:] if t not in (EOS, PAD))
            if tokens not in row_of or float(output.sequences_scores[place]) < -1e8:
                break
            items.append(row_of[tokens])
            scores.append(float(output.sequences_scores[place]))
        users.append((items, scores))
    return users
