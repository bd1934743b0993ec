"""Padded rows over their sample's memory: what rows over a memory of their own compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import SampleRows
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup

CAUSAL = (
    "model.encoder_attention=causal",
    "pretrain.epochs=0",
    "finetune.targets=all-prefixes",
    "finetune.batch_size=12",
)


def test_places_of_rows_leave_room_for_those_of_the_fullest_sample() -> None:
    rows = SampleRows.of(np.array([0, 0, 0, 2]))
    assert (rows.places_R.tolist(), rows.most) == ([0, 1, 2, 6], 3)


@pytest.mark.parametrize(
    "changes",
    [(), ("model.decoder_start=state",), ("activation_checkpointing=true",)],
    ids=["mask", "state", "recomputed"],
)
def test_rows_share_their_samples_memory_and_change_nothing_but_rounding(
    changes: tuple[str, ...], tiny_recipe: Path
) -> None:
    recipe = load_recipe(tiny_recipe, [*CAUSAL, *changes, "model.dropout=0.2"])
    setup, model = build_setup(recipe)
    model.runner.recompute = recipe.activation_checkpointing
    data = StepBatches(setup.stages, setup.reader, setup.layout, recipe, 0, 1)
    batch = data[0].micro_batches[0]
    assert batch.rows is not None
    assert batch.rows.most > 2
    found = []
    for one in (batch, replace(batch, rows=None)):
        model.train().zero_grad()
        torch.manual_seed(3)
        loss = model(inputs=one) / batch.num_target_tokens
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, grads), (expected, others) = found
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)
