"""Tokens about which the catalogue leaves no choice: probability 1 in every search, and no part of
the loss."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from beam_oracle import (
    EOS,
    MOST_ITEMS,
    PREFIXES,
    History,
    Word,
    World,
    best_first,
    catalogues,
    histories_of,
    sharp_model,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED
from genrec_dist.data.collate import target_batch
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie, certain_tokens, nodes_in, restrict
from genrec_dist.inference.load import make_layout
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.head_loss import target_loss

ONE_TOKEN: list[Word] = [(5,), (6,), (7,), (8,)]
CHAIN: list[Word] = [(5, 6, 7), (5, 6, 7, 8, 8)]


def certain_model() -> GenRecForConditionalGeneration:
    model = copy.deepcopy(sharp_model())
    model.config.certain_tokens = "given"
    return model


def continuations(items: list[Word], said: Word) -> set[int]:
    """What can follow these tokens, by the definition: looked up in the list of all items."""
    longer = [(*item, EOS) for item in items]
    return {
        item[len(said)] for item in longer if item[: len(said)] == said and len(item) > len(said)
    }


def learned(items: list[Word], item: Word) -> list[bool]:
    """Of an item's tokens and its end, those that something else could stand for."""
    return [len(continuations(items, item[:place])) > 1 for place in range(len(item) + 1)]


def brute_force(world: World, histories: list[History]) -> np.ndarray:
    """float64 [B, N]: as `World.brute_force`, each item's learned tokens alone."""
    encoder = world.encoder(histories)
    scores = []
    with torch.inference_mode():
        memory = world.model.encode(encoder)
        for item in world.items:
            inputs = torch.tensor([[4, *item]]).expand(len(histories), -1)
            logprobs = world.model.lm_head(
                world.model.decode(inputs, memory, encoder.attention_mask)
            ).log_softmax(-1)
            said = [*item, EOS]
            scores.append(
                sum(
                    logprobs[:, t, said[t]]
                    for t, is_open in enumerate(learned(world.items, item))
                    if is_open
                )
            )
    return torch.stack(scores, 1).numpy()  # type: ignore[arg-type]


def assert_lists(world: World, histories: list[History], exclude: bool, **sizes: Any) -> None:
    truth_BN = brute_force(world, histories)
    lists = world.search(histories, exclude=exclude, **sizes)
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        expected = best_first(truth_N, history if exclude else [])[: sizes["top"]]
        assert [item for item, _ in found] == expected
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[expected], rtol=1e-6, atol=1e-9
        )


@settings(max_examples=40, deadline=None)
@given(catalogues, histories_of, st.booleans(), st.sampled_from([1, 5, MOST_ITEMS]))
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 7)
@example(ONE_TOKEN, [[0, 3], []], True, 3)
@example(CHAIN, [[0], []], False, 2)
def test_every_search_scores_the_open_tokens_alone(
    items: list[Word], draws: list[History], exclude: bool, top: int
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, certain_model())
    assert_lists(world, histories, exclude, beam=world.widest_level, top=top)
    assert_lists(world, histories, exclude, beam=1, top=top, mode="all")


@settings(max_examples=15, deadline=None)
@given(catalogues, histories_of, st.integers(0, 10**6))
@example(PREFIXES, [[0, 3], []], 5)
@example(CHAIN, [[0], []], 0)
def test_among_some_items_scores_stay_those_of_the_whole_catalogue(
    items: list[Word], draws: list[History], kept: int
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, certain_model())
    rows = np.unique([kept % len(items), kept // 7 % len(items)])
    found = world.searcher.among(rows).search(world.encoder(histories), beam=60, top=2)
    truth_BN = brute_force(world, histories)
    for listed, scores, truth_N in zip(found.items, found.scores, truth_BN, strict=True):
        expected = [item for item in best_first(truth_N, []) if item in rows]
        assert [item for item in listed.tolist() if item >= 0] == expected
        np.testing.assert_allclose(scores[: len(rows)], truth_N[expected], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "items", [PREFIXES, ONE_TOKEN, CHAIN], ids=["prefixes", "one token", "chain"]
)
def test_a_static_search_finds_the_same(items: list[Word]) -> None:
    world = World(items, certain_model())
    model = copy.deepcopy(world.model).float()
    encoder, excluded = world.encoder([[0, 1], [1]]), (np.array([0]), np.array([1], np.int32))
    static, plain = (
        TrieSearcher(model, world.searcher.trie, static=static).search(
            encoder, beam=5, top=4, excluded=excluded
        )
        for static in (True, False)
    )
    assert np.array_equal(static.items, plain.items)
    np.testing.assert_allclose(static.scores, plain.scores, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(catalogues)
@example(PREFIXES)
@example(CHAIN)
def test_what_is_certain_follows_from_the_catalogue(items: list[Word]) -> None:
    tokens = np.array([token for item in items for token in item], np.int32)
    certain, ends = certain_tokens(build_trie(tokens, np.cumsum([0, *map(len, items)])))
    expected = [learned(items, item) for item in items]
    assert (~certain).tolist() == [is_open for item in expected for is_open in item[:-1]]
    assert (~ends).tolist() == [item[-1] for item in expected]


@settings(max_examples=40, deadline=None)
@given(catalogues, st.sets(st.integers(0, 10**6), min_size=1, max_size=5))
def test_nodes_of_a_part_are_found_in_the_whole(items: list[Word], kept: set[int]) -> None:
    tokens = np.array([token for item in items for token in item], np.int32)
    whole = build_trie(tokens, np.cumsum([0, *map(len, items)]))
    part = restrict(whole, np.array(sorted({row % len(items) for row in kept})))
    nodes = nodes_in(whole, part)
    assert nodes[0] == 0
    assert np.array_equal(whole.token[nodes], part.token)
    assert np.array_equal(whole.parent[nodes[1:]], nodes[part.parent[1:]])


@settings(max_examples=30, deadline=None)
@given(catalogues, st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
@example(PREFIXES, [0, 1, 2, 3, 4, 5, 6])
@example(CHAIN, [0, 1, 0])
def test_the_loss_is_what_a_search_scores(items: list[Word], targets: list[int]) -> None:
    world = World(items, certain_model())
    layout = make_layout(world.layout.words, world.model.config)
    rows = [target % len(items) for target in targets]
    histories = [[row, 0] for row in rows]
    encoder = world.encoder(histories)
    batch = target_batch(encoder, np.array(rows, np.int32), layout)
    expected = [learned(items, items[row]) for row in rows]
    assert (batch.labels != IGNORED).sum(1).tolist() == [sum(item) for item in expected]
    assert batch.labels.shape[1] == max(len(item) - item[::-1].index(True) for item in expected)
    assert batch.num_target_tokens == sum(map(sum, expected))
    with torch.inference_mode():
        logits, labels = world.model.target_logits(batch)
    truth_BN = brute_force(world, histories)
    total = -sum(truth_N[row] for row, truth_N in zip(rows, truth_BN, strict=True))
    assert float(target_loss(logits.double(), labels, 1)) == pytest.approx(total, rel=1e-5)


def test_free_decoding_is_refused() -> None:
    world = World(PREFIXES, certain_model())
    world.searcher.texts = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"decode mode free: .* tokens\.certain learned"):
        world.search([[0]], beam=2, top=2, mode="free")


def test_spans_are_refused() -> None:
    span = [
        "tokens.certain=given",
        "pretrain.epochs=1",
        "pretrain.mask.strategy=span",
        "run=r",
        "data=d",
    ]
    with pytest.raises(
        ValueError, match=r"pretrain\.mask\.strategy span: .* tokens\.certain learned"
    ):
        load_recipe("tiny", span)


def test_one_item_leaves_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="a catalogue of one item"):
        make_layout(World([(5, 6)], sharp_model()).layout.words, certain_model().config)
