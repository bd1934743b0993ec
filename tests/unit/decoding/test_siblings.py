"""The softmax over siblings: searches against brute force, and the loss against both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from beam_oracle import (
    ALPHABET,
    FIRST,
    GRID,
    PREFIXES,
    History,
    Switches,
    Word,
    World,
    assert_equals_truth,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec_dist.config.load import load_recipe
from genrec_dist.data.collate import target_batch
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.decoding.output_head import siblings_of
from genrec_dist.inference.load import make_layout
from genrec_dist.model.causal.kinds import loss_of_targets

PLAIN = Switches(forced=True, trimmed=True, unit="item", siblings=True)
WHOLE = replace(PLAIN, start="every-state", item_output=True)
NARROW = replace(WHOLE, id_dim=8)

tokens = st.integers(FIRST, FIRST + ALPHABET - 1)
codes = st.integers(1, 3).flatmap(
    lambda length: st.lists(st.tuples(*[tokens] * length), min_size=2, max_size=30, unique=True)
)
"""Catalogues in which no item's word is the beginning of another's."""
histories = st.lists(st.lists(st.integers(0, 10**6), max_size=6), min_size=1, max_size=3)


@pytest.mark.parametrize("mode", ["exact", "compact", "all"])
@settings(max_examples=25, deadline=None)
@given(
    items=codes,
    draws=histories,
    how=st.sampled_from([PLAIN, WHOLE, NARROW]),
    exclude=st.booleans(),
)
@example(items=GRID, draws=[[0, 3], []], how=WHOLE, exclude=True)
def test_search_equals_brute_force(
    mode: str, items: list[Word], draws: list[History], how: Switches, exclude: bool
) -> None:
    world = World(items, how)
    users = [[draw % len(items) for draw in history] for history in draws]
    assert_equals_truth(world, users, mode=mode, exclude=exclude, top=5, beam=world.widest_level)


@pytest.mark.parametrize("how", [PLAIN, WHOLE, NARROW])
def test_scores_among_some_items_are_those_of_the_whole_catalogue(how: Switches) -> None:
    world = World(GRID, how)
    users, kept = [[0, 3], [5]], [1, 6, 7, 12]
    truth = world.truth(users)
    world.searcher = world.searcher.among(np.array(kept)).among(np.array([1, 7, 12]))
    for row, found in enumerate(world.search(users, beam=20, top=4)):
        assert sorted(item for item, _ in found) == [1, 7, 12]
        for item, score in found:
            assert score == pytest.approx(truth[row, item], rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(items=codes, draws=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
@pytest.mark.parametrize("how", [PLAIN, WHOLE, NARROW])
def test_loss_is_what_a_search_scores(how: Switches, items: list[Word], draws: list[int]) -> None:
    world = World(items, how)
    rows = [draw % len(items) for draw in draws]
    users = [[row, 0] for row in rows]
    layout = make_layout(world.layout.words, world.model.config)
    batch = target_batch(world.encoder(users), np.array(rows, np.int32), layout)
    world.model.siblings = siblings_of(world.trie)
    with torch.inference_mode():
        loss = float(loss_of_targets(world.model, batch))
    total = -world.truth(users)[np.arange(len(rows)), rows].sum()
    assert loss == pytest.approx(total, rel=1e-5, abs=1e-4)  # logits in float32


def test_an_item_that_begins_another_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"item row 0 is the beginning of another's: .*--numbering"
    ):
        World(PREFIXES, PLAIN)


def test_soft_targets_of_drawn_items_are_those_of_the_distribution() -> None:
    world = World(GRID, WHOLE)
    world.model.siblings = siblings_of(world.trie)
    layout = make_layout(world.layout.words, world.model.config)
    items_K, shares_K, true = [3, 0, 1, 9], [0.2, 0.1, 0.15, 0.25], 2
    teacher = Teacher(
        np.zeros(1, np.int64), np.array([items_K], np.int32), np.array([shares_K], np.float32)
    )
    whole = dict(zip(items_K, shares_K, strict=True)) | {true: 1 - sum(shares_K)}
    expected = -sum(share * world.truth([[5, 0]])[0, item] for item, share in whole.items())
    found = 0.0
    for item, share in whole.items():
        drawn = np.array([item], np.int32)
        batch = target_batch(world.encoder([[5, 0]]), drawn, layout)
        prefix = np.zeros(1, np.int64)
        soft = teacher.soft_siblings(prefix, np.array([true], np.int32), drawn, layout)
        with torch.inference_mode():
            hidden, _ = world.model.target_states(world.model.encode(batch.encoder), batch)
            rows = world.model.output_rows()
            loss = world.model.siblings.loss(hidden, batch.children, rows, soft)
        found += share * float(loss)
    assert found == pytest.approx(expected, rel=1e-4)
    # And they are drawn as often as the distribution says.
    many = np.zeros(20_000, np.int64)
    teacher = Teacher(
        many, np.tile(teacher.items_SK, (20_000, 1)), np.tile(teacher.shares_SK, (20_000, 1))
    )
    drawn = teacher.draw_items(np.arange(20_000), np.full(20_000, true, np.int32), 0, 1)
    for item, share in whole.items():
        assert (drawn == item).mean() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokens.forced=learned", "tokens.softmax siblings: tokens.forced is learned"),
        ("finetune.label_smoothing=0.1", "no label smoothing"),
        ("tokens.softmax=vocabulary", "model.item_output true: set tokens.softmax siblings"),
        ("model.item_ids=false", "model.item_output true: .* model.item_ids true"),
        (
            "optimizer.id_tables=row-adagrad model.init_items=random",
            "item_output true: row-adagrad",
        ),
        ("model.architecture=t5", "model.architecture t5"),
    ],
)
def test_what_a_softmax_over_siblings_cannot_have_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("codes", ["data=d", "run=r", *override.split()])
