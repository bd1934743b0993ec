"""A micro-batch as one buffer, between processes and on its way to a device."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import Batch, in_one_buffer, out_of_buffer
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """All tensors and arrays of nested dataclasses."""
    if isinstance(value, Tensor | np.ndarray):
        return {name: torch.as_tensor(value)}
    if not dataclasses.is_dataclass(value):
        return {}
    found = {}
    for item in dataclasses.fields(value):
        found |= tensors_of(getattr(value, item.name), f"{name}.{item.name}")
    return found


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def batch(request: pytest.FixtureRequest, tiny_recipe: Path) -> Batch:
    changes = ["model.item_loss=1", "model.encoder_unit=item"]
    setup, model = build_setup(load_recipe(tiny_recipe, changes))
    config, packed = model.config, request.param
    data = StepBatches(
        setup.stages, setup.reader, setup.layout, setup.recipe, 0, 1, sums=config, packed=packed
    )
    return data[0].micro_batches[0]


def test_another_process_gets_the_same_batch_in_one_tensor(batch: Batch) -> None:
    received = pickle.loads(pickle.dumps(batch))
    ours, theirs = tensors_of(batch), tensors_of(received)
    assert len(ours) >= 10
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    assert received.work == batch.work
    storages = {
        tensor.untyped_storage().data_ptr()
        for tensor in (received.labels, received.encoder.input_ids, received.plan.packed)
    }
    assert len(storages) == 1


def test_what_was_changed_after_receiving_is_what_goes_to_the_device(batch: Batch) -> None:
    received = pickle.loads(pickle.dumps(batch))
    changed = dataclasses.replace(received, labels=received.labels + 1)
    assert changed.to(torch.device("meta")).labels.shape == batch.labels.shape
    assert torch.equal(out_of_buffer(*in_one_buffer(changed)).labels, batch.labels + 1)
    assert "_buffered" not in changed.__dict__


def test_tensors_begin_where_a_kernel_reads_wide(batch: Batch) -> None:
    _, placed = in_one_buffer(batch)
    places = [placed.labels, placed.encoder.input_ids, placed.encoder_row, placed.plan.packed]
    assert all(place.first % 16 == 0 for place in places)
