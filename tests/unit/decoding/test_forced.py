"""Tokens about which the catalogue leaves no choice: what they are, and that they are no part of
the loss. What searches make of them is in test_searches.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from beam_oracle import CHAIN, PREFIXES, Switches, Word, World, catalogues
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED
from genrec_dist.data.collate import target_batch
from genrec_dist.decoding.trie import forced_tokens, nodes_in_whole, restrict
from genrec_dist.inference.load import make_layout
from genrec_dist.model.head_loss import target_loss

FORCED = Switches(forced=True)


@settings(max_examples=40, deadline=None)
@given(catalogues)
@example(PREFIXES)
@example(CHAIN)
def test_forced_tokens_follow_from_the_catalogue(items: list[Word]) -> None:
    world = World(items)
    forced, ends = forced_tokens(world.trie)
    expected = [world.learned(item) for item in items]
    assert (~forced).tolist() == [is_open for item in expected for is_open in item[:-1]]
    assert (~ends).tolist() == [item[-1] for item in expected]


@settings(max_examples=40, deadline=None)
@given(catalogues, st.sets(st.integers(0, 10**6), min_size=1, max_size=5))
def test_nodes_in_whole_finds_the_nodes_of_a_part(items: list[Word], kept: set[int]) -> None:
    whole = World(items).trie
    part = restrict(whole, np.array(sorted({row % len(items) for row in kept})))
    nodes = nodes_in_whole(whole, part)
    assert nodes[0] == 0
    assert np.array_equal(whole.token[nodes], part.token)
    assert np.array_equal(whole.parent[nodes[1:]], nodes[part.parent[1:]])


@settings(max_examples=30, deadline=None)
@given(catalogues, st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
@example(PREFIXES, [0, 1, 2, 3, 4, 5, 6])
@example(CHAIN, [0, 1, 0])
def test_loss_is_what_a_search_scores(items: list[Word], targets: list[int]) -> None:
    world = World(items, FORCED)
    rows = [target % len(items) for target in targets]
    histories = [[row, 0] for row in rows]
    layout = make_layout(world.layout.words, world.model.config)
    batch = target_batch(world.encoder(histories), np.array(rows, np.int32), layout)
    expected = [world.learned(items[row]) for row in rows]
    assert (batch.labels != IGNORED).sum(1).tolist() == [sum(item) for item in expected]
    assert batch.labels.shape[1] == max(len(item) - item[::-1].index(True) for item in expected)
    assert batch.num_target_tokens == sum(map(sum, expected))
    with torch.inference_mode():
        logits, labels = world.model.target_logits(batch)
    total = -world.truth(histories)[np.arange(len(rows)), rows].sum()
    assert float(target_loss(logits.double(), labels, 1)) == pytest.approx(total, rel=1e-5)


def test_spans_are_refused_with_forced_tokens() -> None:
    span = ["pretrain.epochs=1", "pretrain.mask.strategy=span", "run=r", "data=d"]
    with pytest.raises(
        ValueError, match=r"pretrain\.mask\.strategy span: .* tokens\.forced learned"
    ):
        load_recipe("tiny", ["tokens.forced=given", *span])


def test_a_catalogue_of_one_item_leaves_nothing_to_learn() -> None:
    world = World([(5, 6)], FORCED)
    with pytest.raises(ValueError, match="a catalogue of one item"):
        make_layout(world.layout.words, world.model.config)
