"""The item head: what it is asked, its loss, and ranking by it and by both heads, against brute
force."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from batch_cases import CODES, WHOLE, cases, layout, marked_sequences, whole_step
from batch_cases import model as plain_model
from beam_oracle import (
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
from item_oracle import item_truth, item_world, with_item_head
from torch.nn import functional as F

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED, dummy_batch
from genrec_dist.data.collate import BatchOptions, choose_targets, make_step
from genrec_dist.evaluation.score_mixture import Mixture
from genrec_dist.inference.load import load_run
from genrec_dist.training.run import train

__all__ = ["plain_model"]


def asking(samples, source, mask, packed, budget=WHOLE):
    return make_step(
        samples,
        source,
        layout(90),
        BatchOptions(
            micro_batch_tokens=budget, seed=3, mask=mask, packed=packed, item_targets=True
        ),
        epoch=0,
    ).micro_batches


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_each_mask_is_asked_for_its_own_item(space, mask, packed):
    """Of several items behind one mask (span) for the first."""
    source = marked_sequences()
    samples = whole_step(source, space)
    batches = asking(samples, source, mask, packed, 200)
    positions = samples.target_positions[:, None]
    if mask is not None:
        positions = choose_targets(samples, layout(90), mask, 3, 0).positions_BK
        if mask.strategy == "span":
            positions = positions[:, :1]
    expected = sorted(
        source.sequences[int(user)][place]
        for user, row in zip(samples.user_rows, positions, strict=True)
        for place in row[row >= 0]
    )
    asked = []
    for batch in batches:
        flat = batch.encoder.input_ids.flatten()[batch.item_targets.places_R]
        first_inputs = batch.decoder_input_ids
        starts = first_inputs[batch.packing.rows.offsets[:-2]] if packed else first_inputs[:, 0]
        assert torch.equal(flat, starts), "the place is not that of the row's mask"
        asked += batch.item_targets.items_R.tolist()
    assert sorted(asked) == expected
    assert max(asked) < len(CODES)


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_its_loss_is_added_a_target_whatever_the_cut_or_packing(
    plain_model, space, mask, head, monkeypatch
):
    model = with_item_head(plain_model, 0.7)
    monkeypatch.setattr(model, "loss_by", head)
    source, samples = marked_sequences(), whole_step(marked_sequences(), space)[:40]

    def loss_and_gradient(batches, item_head=True):
        tokens, targets = (
            sum(getattr(b, name) for b in batches) for name in ("num_target_tokens", "num_targets")
        )
        model.zero_grad()
        value = 0.0
        for batch in batches:
            loss = model(
                **vars(batch.encoder), encoder_row=batch.encoder_row, decoder_input_ids=batch.decoder_input_ids,
                labels=batch.labels, packing=batch.packing, item_targets=batch.item_targets if item_head else None,
                tokens_per_target=tokens / targets,
            ) / tokens  # fmt: skip
            loss.backward()
            value += loss.item()
        return value, torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    padded = asking(samples, source, mask, False)
    loss, gradient = loss_and_gradient(padded)
    # By hand: a token's mean of the decoder's, and .7 of a target's mean of the item head's.
    total, targets = 0.0, 0
    for batch in padded:
        memory = model.encode(batch.encoder)
        masked = memory.flatten(0, 1)[batch.item_targets.places_R]
        logits = masked @ model.item_embedding.weight[1:].T
        total += F.cross_entropy(logits, batch.item_targets.items_R, reduction="sum").item()
        targets += len(logits)
    alone, _ = loss_and_gradient(padded, item_head=False)
    assert loss == pytest.approx(alone + 0.7 * total / targets, rel=1e-5)
    for budget in (WHOLE, 150):
        other_loss, other_gradient = loss_and_gradient(asking(samples, source, mask, True, budget))
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_idle_batch_asks_for_nothing(plain_model, packed):
    model = with_item_head(plain_model, 1.0)
    source = marked_sequences()
    dummy = dummy_batch(asking(whole_step(source, "last"), source, None, packed)[-1])
    assert set(dummy.item_targets.items_R.tolist()) == {IGNORED}
    assert dummy.num_targets == 0
    model.zero_grad()
    model(
        **vars(dummy.encoder), encoder_row=dummy.encoder_row, decoder_input_ids=dummy.decoder_input_ids,
        labels=dummy.labels, packing=dummy.packing, item_targets=dummy.item_targets,
    ).backward()  # fmt: skip
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@settings(max_examples=20, deadline=None)
@given(catalogues, histories_of, st.booleans(), st.sampled_from([1, 5, MOST_ITEMS]))
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 7)
def test_items_ranks_by_the_item_head_alone(
    items: list[Word], draws: list[History], exclude: bool, top: int
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = item_world(items)
    truth_BN = item_truth(world, histories)
    lists = world.search(histories, beam=1, top=top, exclude=exclude, mode="items")
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])[:top]
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[[item for item, _ in found]], rtol=1e-6
        )


@settings(max_examples=30, deadline=None)
@given(
    catalogues,
    histories_of,
    st.booleans(),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from(["mask", "state"]),
)
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 1.0, "state")
def test_hybrid_with_a_wide_beam_is_the_weighted_sum_of_both(
    items: list[Word], draws: list[History], exclude: bool, weight: float, start: str
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = item_world(items, start)
    truth_BN = world.brute_force(histories) + weight * item_truth(world, histories)
    lists = world.search(
        histories,
        beam=world.widest_level,
        top=len(items),
        exclude=exclude,
        mode="hybrid",
        mixture=Mixture(weight),
    )
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[[item for item, _ in found]], rtol=1e-6
        )


@settings(max_examples=20, deadline=None)
@given(catalogues, histories_of, st.booleans(), st.sampled_from(["exact", "all"]))
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, "exact")
def test_a_decoder_that_starts_from_a_state_is_searched_as_it_is_trained(
    items: list[Word], draws: list[History], exclude: bool, mode: str
) -> None:
    """Each user from her own state, also where users are padded, in all the ways to search."""
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = item_world(items, "state")
    truth_BN = world.brute_force(histories)
    lists = world.search(
        histories, beam=world.widest_level, top=len(items), exclude=exclude, mode=mode
    )
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[[item for item, _ in found]], rtol=1e-6
        )


def test_hybrid_lists_what_only_one_head_finds() -> None:
    """A narrow beam and few of the item head's: each of the two best lists is among the
    candidates."""
    world = item_world([(5, a, b) for a in (5, 6, 7, 8) for b in (5, 6, 7, 8)])
    (spoken,) = world.search([[1, 2]], beam=2, top=2)
    (named,) = world.search([[1, 2]], beam=2, top=2, mode="items")
    (heavy,) = world.search([[1, 2]], beam=2, top=2, mode="hybrid", mixture=Mixture(1000.0))
    (light,) = world.search([[1, 2]], beam=2, top=2, mode="hybrid", mixture=Mixture(0.0))
    assert {item for item, _ in spoken} != {item for item, _ in named}
    assert [item for item, _ in heavy] == [item for item, _ in named]
    candidates = {item for item, _ in spoken + named}
    truth_N = world.brute_force([[1, 2]])[0]
    assert [item for item, _ in light] == [
        item for item in best_first(truth_N, []) if item in candidates
    ][:2]


@pytest.mark.parametrize("mode", ["items", "hybrid"])
def test_a_model_without_an_item_head_says_so(mode: str) -> None:
    with pytest.raises(ValueError, match=r"no item head: train with model\.item_loss"):
        World(PREFIXES, sharp_model()).search([[0]], beam=2, top=2, mode=mode)


def test_items_that_are_not_allowed_are_not_listed() -> None:
    world = item_world(PREFIXES)
    world.searcher = world.searcher.among(np.array([1, 4]))
    for mode in ("items", "hybrid"):
        (found,) = world.search([[0]], beam=7, top=7, mode=mode)
        assert {item for item, _ in found} == {1, 4}


def test_a_run_with_an_item_head_trains_validates_by_it_and_is_loaded(tiny_recipe, tmp_path):
    recipe = load_recipe(
        tiny_recipe,
        [
            "model.item_loss=0.5",
            "model.encoder_unit=item",
            "model.id_dim=8",
            "model.decoder_start=state",
            "validation.decode=hybrid",
        ],
    )
    run = load_run(train(recipe))
    assert run.model.config.item_loss == 0.5
    assert run.layout.unit == "item"
    assert run.model.item_projection is not None
    lists = run.searcher.search(run_encoder := _histories(run), beam=20, top=20, mode="hybrid")
    assert (lists.items >= 0).all()
    assert len(run_encoder.input_ids) == len(lists.items)


def test_evaluate_names_what_is_ranked_by_both_heads(tiny_recipe):
    """By the command itself: a row of its own, and its weight in the protocol."""
    run = train(load_recipe(tiny_recipe, ["model.item_loss=0.5"]))
    for mode, system, weight in (
        ("hybrid", "genrec, hybrid", 0.25),
        ("items", "genrec, item head", None),
    ):
        assert run_command(["evaluate", str(run), "--decode", mode, "--item-weight", "0.25"]) == 0
        found = json.loads((run / "metrics-test.json").read_text())
        assert (found["system"], found["protocol"]["decode"], found["protocol"]["item_weight"]) == (
            system,
            mode,
            weight,
        )


def _histories(run):
    from genrec_dist.data.encoder_input import encode_histories

    return encode_histories(
        np.array([0, 1, 2, 3], np.int32), np.array([0, 1, 4]), np.array([0, 1]), run.layout
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (["model.item_loss=0.5", "model.item_ids=false"], "set model.item_ids true"),
        (
            ["model.item_loss=0.5", "optimizer.id_tables=row-adagrad"],
            r"set optimizer\.id_tables dense",
        ),
        (["validation.decode=items"], r"there is no item head: set model\.item_loss"),
    ],
)
def test_what_an_item_head_cannot_have_is_refused(tiny_recipe, override, told):
    with pytest.raises(ValueError, match=told):
        load_recipe(tiny_recipe, override)
