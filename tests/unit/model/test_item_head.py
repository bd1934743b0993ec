"""The item head: its targets and its loss."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from batch_cases import CODES, WHOLE, cases, layout, marked_sequences, whole_step
from batch_cases import model as plain_model
from torch.nn import functional as F

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED, dummy_batch
from genrec_dist.data.collate import BatchOptions
from genrec_dist.data.samples.step import choose_targets, make_step
from genrec_dist.model.genrec import GenRecForConditionalGeneration

__all__ = ["plain_model"]


def with_item_head(
    model: GenRecForConditionalGeneration, weight: float
) -> GenRecForConditionalGeneration:
    model = copy.deepcopy(model)
    model.config.item_loss = weight
    return model


def item_batches(samples, source, mask, packed, budget=WHOLE):
    options = BatchOptions(
        micro_batch_tokens=budget, seed=3, mask=mask, packed=packed, item_targets=True
    )
    return make_step(samples, source, layout(90), options, 0).micro_batches


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_item_targets_are_the_masked_items(space, mask, packed):
    """Of several items behind one mask (span) for the first."""
    source = marked_sequences()
    samples = whole_step(source, space)
    batches = item_batches(samples, source, mask, packed, 200)
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
    targets = []
    for batch in batches:
        flat = batch.encoder.input_ids.flatten()[batch.item_targets.places_R]
        first_inputs = batch.decoder_input_ids
        starts = first_inputs[batch.packing.rows.offsets[:-2]] if packed else first_inputs[:, 0]
        assert torch.equal(flat, starts), "the place is not that of the row's mask"
        targets += batch.item_targets.items_R.tolist()
    assert sorted(targets) == expected
    assert max(targets) < len(CODES)


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_item_loss_is_added_per_target_whatever_the_cut_or_packing(
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
            inputs = batch if item_head else replace(batch, item_targets=None)
            loss = model(inputs=inputs, tokens_per_target=tokens / targets) / tokens
            loss.backward()
            value += loss.item()
        return value, torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    padded = item_batches(samples, source, mask, False)
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
        other_loss, other_gradient = loss_and_gradient(
            item_batches(samples, source, mask, True, budget)
        )
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dummy_batch_has_no_item_targets(plain_model, packed):
    model = with_item_head(plain_model, 1.0)
    source = marked_sequences()
    dummy = dummy_batch(item_batches(whole_step(source, "last"), source, None, packed)[-1])
    assert set(dummy.item_targets.items_R.tolist()) == {IGNORED}
    assert dummy.num_targets == 0
    model.zero_grad()
    model(inputs=dummy).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["model.item_loss=0.5", "model.item_ids=false"], "set model.item_ids true"),
        (
            ["model.item_loss=0.5", "optimizer.id_tables=row-adagrad"],
            r"set optimizer\.id_tables dense",
        ),
        (["validation.decode=items"], r"there is no item head: set model\.item_loss"),
    ],
)
def test_load_recipe_refuses_what_an_item_head_cannot_have(tiny_recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe, override)
