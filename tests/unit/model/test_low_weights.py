"""Copies of the linear weights: autocast's bits, with one cast of all of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genrec_dist.config.load import load_recipe
from genrec_dist.model.low_weights import LowWeights
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_steps_have_the_bits_of_autocast(packed: bool, tiny_recipe: Path) -> None:
    setup, model = build_setup(load_recipe(tiny_recipe, ["model.dropout=0", "model.id_dim=8"]))
    data = StepBatches(setup.stages, setup.reader, setup.layout, setup.recipe, 0, 1, packed=packed)
    batches = [batch for step in (data[0], data[1]) for batch in step.micro_batches][:3]

    def steps(lowered: bool) -> tuple[list[float], dict[str, Tensor]]:
        """Two steps, the first of two micro-batches."""
        ours = copy.deepcopy(model).train()
        low = LowWeights(ours, torch.bfloat16)
        optimizer, losses = torch.optim.AdamW(ours.parameters(), lr=0.01), []
        for part in (batches[:2], batches[2:]):
            for batch in part:
                with torch.autocast("cpu", torch.bfloat16):
                    if lowered:
                        with low.in_place():
                            loss = ours(inputs=batch)
                    else:
                        loss = ours(inputs=batch)
                loss.backward()
                losses.append(float(loss.detach()))
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.parameters())
            optimizer.step()
            optimizer.zero_grad()
            low.is_fresh = False
        return losses, dict(ours.named_parameters())

    (losses, weights), (expected, others) = steps(True), steps(False)
    assert losses == expected
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_the_layers_have_their_own_weights_again_afterwards(tiny_recipe: Path) -> None:
    _, model = build_setup(load_recipe(tiny_recipe))
    low, layer = LowWeights(model, torch.bfloat16), model.model.encoder.layers[0].fc1
    before = layer.weight
    with low.in_place():
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.requires_grad
        assert layer.weight is not before
    assert layer.weight is before
    assert model.lm_head.weight not in set(low.masters)
