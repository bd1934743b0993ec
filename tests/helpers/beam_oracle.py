"""Small catalogues and brute force over all their items, which every search is held against."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from genrec_dist.bench.peers.beam import generated_lists, make_generate
from genrec_dist.config.recipe import Model
from genrec_dist.data.encoder_input import EncoderInput, encode_histories
from genrec_dist.data.layout import Layout
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.rescoring import HistoryProbabilities
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.model.build import CodedModel, ModelSizes, build_model
from genrec_dist.model.network import IdEmbedding

BOS, PAD, EOS, MASK, FIRST = 0, 1, 2, 4, 5
ALPHABET, MOST_ITEMS, NUM_USERS = 4, 60, 6

Word = tuple[int, ...]
History = list[int]

PREFIXES: list[Word] = [(5,), (5, 6), (5, 6, 6), (6,), (5, 6, 6, 6), (7, 7), (7, 7, 8, 8)]
ONE_TOKEN: list[Word] = [(5,), (6,), (7,), (8,)]
CHAIN: list[Word] = [(5, 6, 7), (5, 6, 7, 8, 8)]
GRID: list[Word] = [(5, a, b) for a in (5, 6, 7, 8) for b in (5, 6, 7, 8)]

catalogues = st.lists(
    st.lists(st.integers(FIRST, FIRST + ALPHABET - 1), min_size=1, max_size=4).map(tuple),
    min_size=2,
    max_size=MOST_ITEMS,
    unique=True,
)
draws_of_histories = st.lists(st.lists(st.integers(0, 10**6), max_size=8), min_size=1, max_size=4)


@dataclass(frozen=True)
class Switches:
    """What may differ in a model and its searches."""

    forced: bool = False
    """Tokens that only the trie decides have probability 1."""
    trimmed: bool = False
    """The softmax has the catalogue's tokens alone, in numbers of their own."""
    unit: str = "subword"
    """What an encoder position is."""
    start: str = "mask"
    """What the decoder starts from."""
    head: bool = False
    """With an item head."""
    architecture: str = "bart"
    """Whose layers."""
    siblings: bool = False
    """Tokens share with those that can follow the same beginning; no item begins another."""
    item_output: bool = False
    """With siblings: items' id rows are a part of the output rows."""
    id_dim: int = 0
    """Width of the id tables."""


switches = st.builds(
    Switches,
    forced=st.booleans(),
    trimmed=st.booleans(),
    unit=st.sampled_from(["subword", "item"]),
    start=st.sampled_from(["mask", "state"]),
    head=st.booleans(),
    architecture=st.sampled_from(["bart", "t5"]),
)


@cache
def sharp_model(
    how: Switches = Switches(), vocabulary: int = FIRST + ALPHABET, num_items: int = MOST_ITEMS
) -> CodedModel:
    """Random weights, large enough that scores lie far apart, in float64."""
    torch.manual_seed(3)
    shape = Model(
        d_model=16, encoder_layers=1, decoder_layers=2, heads=2, ffn=32, max_tokens=64,
        init_std=0.4, architecture=how.architecture,
        encoder_unit=how.unit, decoder_start=how.start, item_loss=float(how.head),
        item_output=how.item_output, id_dim=how.id_dim,
    )  # fmt: skip
    tokens = {"bos": BOS, "pad": PAD, "eos": EOS, "mask": MASK}
    model = build_model(
        shape,
        ModelSizes(
            vocab_size=vocabulary,
            num_users=NUM_USERS,
            num_items=num_items,
            num_masks=1,
            special={name: number_of(token, how) for name, token in tokens.items()},
        ),
    )
    model.config.certain_tokens = "given" if how.forced else "learned"
    model.config.softmax = "siblings" if how.siblings else "vocabulary"
    model.config.spoken_tokens = 1 + ALPHABET if how.trimmed else 0
    return model.double().eval()


def among_items(model: CodedModel, num_items: int) -> CodedModel:
    """The same model, its item head over the first so many items alone."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    table = IdEmbedding(num_items, model.item_embedding.embedding_dim).double()
    table.weight = torch.nn.Parameter(model.item_embedding.weight[: num_items + 1].detach())
    other.item_embedding = table
    return other


def number_of(token: int, how: Switches) -> int:
    """A token's row: those of a trimmed vocabulary that are output come first."""
    order = [EOS, *range(FIRST, FIRST + ALPHABET), BOS, PAD, MASK, 3]
    return order.index(token) if how.trimmed else token


class World:
    """A catalogue with a model for its words."""

    def __init__(
        self,
        items: list[Word],
        how: Switches = Switches(),
        model: CodedModel | None = None,
    ):
        self.how = how
        self.items = [tuple(number_of(token, how) for token in item) for item in items]
        self.model = model or among_items(sharp_model(how), len(items))
        config = self.model.config
        self.eos, self.mask, self.pad = (
            config.eos_token_id, config.decoder_start_token_id, config.pad_token_id,
        )  # fmt: skip
        user = (number_of(FIRST, how),) * 2
        special = [(config.bos_token_id,), (self.eos,), (self.mask,)]
        words: list[Word] = [*special, *self.items, *[user] * NUM_USERS]
        tokens = np.array(list(chain(*words)), np.int32)
        table = WordTable(tokens, np.cumsum([0, *map(len, words)]), 1, len(items), NUM_USERS)
        self.layout = Layout(
            words=table, pad_token=self.pad, max_tokens=64, user_ids=True,
            positions="from-start", unit=how.unit,
        )  # fmt: skip
        self.trie = build_trie(*table.tokens_of_items())
        self.searcher = TrieSearcher(self.model, self.trie)
        self.widest_level = int(np.diff(self.trie.level_offsets).max())
        self.after: dict[Word, set[int]] = defaultdict(set)
        """What can follow a beginning, looked up in the list of all items."""
        for whole in ((*item, self.eos) for item in self.items):
            for place, token in enumerate(whole):
                self.after[whole[:place]].add(token)

    def encoder(self, histories: list[History], users: list[int] | None = None) -> EncoderInput:
        items = np.array(list(chain(*histories)), np.int32)
        rows = np.arange(len(histories)) % NUM_USERS if users is None else np.array(users)
        return encode_histories(items, np.cumsum([0, *map(len, histories)]), rows, self.layout)

    def search(
        self,
        histories: list[History],
        *,
        exclude: bool = False,
        users: list[int] | None = None,
        **options: Any,
    ) -> list[list[tuple[int, float]]]:
        """(item, score) lists, checked for their form: distinct, sorted, -1 and -inf only at the
        end."""
        found = self.searcher.search(
            self.encoder(histories, users),
            excluded=pairs_of(histories) if exclude else None,
            **options,
        )
        assert found.items.shape == found.scores.shape == (len(histories), options["top"])
        assert (found.items.dtype, found.scores.dtype) == (np.int32, np.float32)
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

    def learned(self, item: Word) -> list[bool]:
        """Of an item's tokens and its end, those that something else could be in place of."""
        return [len(self.after[item[:place]]) > 1 for place in range(len(item) + 1)]

    @torch.inference_mode()
    def truth(
        self,
        histories: list[History],
        mode: str = "exact",
        mixture: Mixture | None = None,
        known: HistoryProbabilities | None = None,
    ) -> np.ndarray:
        """float64 [B, N]: the scores of all items by whole sequences, user by user."""
        if mode == "items":
            return self._item_head(histories)
        scores_BN = self._decoder(histories, compact=mode == "compact")
        if mode == "hybrid":
            mixture, known = mixture or Mixture(), known or HistoryProbabilities()
            if self.how.head:
                scores_BN = scores_BN + mixture.item_weight * self._item_head(histories)
            if known.graph is not None:
                near_BN = (1 - mixture.epsilon) * known.graph.numpy()
                near_BN = np.log(near_BN + mixture.epsilon / len(self.items))
                scores_BN = scores_BN + mixture.graph_weight * near_BN
            if known.repeat is not None:
                scores_BN = scores_BN + mixture.repeat_weight * np.log(known.repeat.numpy())
            if known.text is not None and mixture.text is not None:
                near_BN = (1 - mixture.text.epsilon) * known.text.numpy()
                near_BN = np.log(near_BN + mixture.text.epsilon / len(self.items))
                scores_BN = scores_BN + mixture.text.weight * near_BN
        return scores_BN

    def _decoder(self, histories: list[History], compact: bool) -> np.ndarray:
        """log p of each item's tokens and `</s>`."""
        encoder = self.encoder(histories)
        memory = self.model.encode(encoder)
        copies, longest = len(self.items), max(map(len, self.items)) + 1
        padded = [[*item, *[-1] * (longest - len(item))] for item in self.items]
        inputs = torch.tensor([[self.mask, *row[:-1]] for row in padded])
        inputs = inputs.masked_fill(inputs < 0, self.pad)
        labels = torch.tensor(padded)
        labels[torch.arange(copies), torch.tensor([len(item) for item in self.items])] = self.eos
        if self.how.forced:
            for row, item in enumerate(self.items):
                for place, is_open in enumerate(self.learned(item)):
                    labels[row, place] = labels[row, place] if is_open else -1
        vocabulary = self.model.config.vocab_size
        output = torch.ones(vocabulary, dtype=torch.bool)
        if compact or self.how.trimmed:
            output[:] = False
        if compact:
            output[sorted({self.eos, *chain(*self.items)})] = True
        elif self.how.trimmed:
            output[: 1 + ALPHABET] = True
        scores = []
        for row in range(len(histories)):
            mask_L, start = encoder.attention_mask[row], None
            if self.how.start != "mask":  # at [MASK], the last but </s>
                start = memory[row, int(mask_L.sum()) - 2].expand(copies, -1)
            hidden = self.model.decode(
                inputs, memory[row].expand(copies, -1, -1), mask_L.expand(copies, -1), start
            )
            logits = hidden @ self.model.lm_head.weight.T
            if self.how.siblings:
                logits = self._among_siblings(logits, hidden)
            logprobs = logits.masked_fill(~output, -torch.inf).log_softmax(-1)
            gained = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            scores.append(gained.masked_fill(labels < 0, 0.0).sum(1))
        return torch.stack(scores).numpy()

    def _among_siblings(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[N, T, V]: -inf for tokens that cannot follow an item's beginning, and what an item's
        own row adds where a token leaves it alone."""
        logits = logits.clone()
        beginnings = Counter(item[: place + 1] for item in self.items for place in range(len(item)))
        for row, item in enumerate(self.items):
            for place in range(len(item) + 1):
                follow = self.after[item[:place]]
                others = [t for t in range(logits.shape[2]) if t not in follow]
                logits[row, place, others] = -torch.inf
                for other, word in enumerate(self.items):
                    is_below = word[:place] == item[:place] and len(word) > place
                    if not (self.how.item_output and is_below and len(item) > place):
                        continue
                    if beginnings[word[: place + 1]] == 1:
                        own_F = self.model.item_embedding.weight[other + 1]
                        if self.model.item_projection is not None:
                            own_F = self.model.item_projection(own_F)
                        logits[row, place, word[place]] += own_F @ hidden[row, place]
        return logits

    def _item_head(self, histories: list[History]) -> np.ndarray:
        rows = []
        for row, history in enumerate(histories):
            state = self.model.encode(self.encoder([history], users=[row % NUM_USERS]))[0, -2]
            logits = self.model.item_embedding.weight[1:] @ state
            rows.append(logits.log_softmax(0).numpy()[: len(self.items)])
        return np.stack(rows)


def assert_equals_truth(
    world: World,
    histories: list[History],
    *,
    exclude: bool,
    beam: int,
    top: int,
    mode: str = "exact",
    allowed: list[int] | None = None,
    **parts: Any,
) -> None:
    """The best items or all of them, in order, with their scores; shorter lists where items are
    excluded."""
    truth_BN = world.truth(histories, mode, **parts)
    lists = world.search(histories, beam=beam, top=top, exclude=exclude, mode=mode, **parts)
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        best = best_first(truth_N, history if exclude else [], allowed)[:top]
        assert [item for item, _ in found] == best
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[best], rtol=1e-6, atol=1e-9
        )


def pairs_of(histories: list[History]) -> tuple[np.ndarray, np.ndarray]:
    index = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return index, np.array(list(chain(*histories)), np.int32)


def best_first(
    scores_N: np.ndarray, without: History, allowed: list[int] | None = None
) -> list[int]:
    order = np.argsort(-scores_N, kind="stable").tolist()
    return [item for item in order if item not in without and (allowed is None or item in allowed)]


def items_of(found: list[tuple[int, float]]) -> list[int]:
    return [item for item, _ in found]


def histories_from(draws: list[History], num_items: int) -> list[History]:
    return [[draw % num_items for draw in history] for history in draws]


def all_pairs() -> list[Word]:
    """56 items: `a b` and `a b c` of the alphabet, many of them prefixes of others."""
    letters = range(FIRST, FIRST + ALPHABET)
    pairs = [(a, b) for a in letters for b in letters]
    return pairs + [(*pair, c) for pair in pairs for c in letters if (sum(pair) + c) % 8 < 5]


def random_histories(world: World, count: int) -> list[History]:
    rng = np.random.default_rng(5)
    return [rng.permutation(len(world.items))[: rng.integers(0, 9)].tolist() for _ in range(count)]


def hugging_face(
    model: CodedModel, words: WordTable, encoder: EncoderInput, beam: int
) -> list[tuple[list[int], list[float]]]:
    """(items, scores) of each user as `generate` gives them with a trie in
    `prefix_allowed_tokens_fn`, those that are items alone."""
    output = make_generate(model, words, encoder, beam)(output_scores=True)
    lists = generated_lists(output, model, words, len(encoder.input_ids))
    are_items = (lists.items >= 0) & (lists.scores > -1e8)
    return [
        (items[real].tolist(), scores[real].tolist())
        for items, scores, real in zip(lists.items, lists.scores, are_items, strict=True)
    ]
