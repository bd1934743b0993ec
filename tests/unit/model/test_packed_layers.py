"""Ways to run the layers: each has the numbers of the plain one."""

import pytest
import torch
from batch_cases import (
    batches_of,
    cases,
    engine_loss,
    layout,
    marked_sequences,
    model,
    whole_step,
)

from genrec_dist.model.genrec import choose_layers
from genrec_dist.model.packed_layers import LayerRunner

__all__ = ["model"]


@pytest.fixture
def learning(model, monkeypatch):
    """The model in training mode with dropout everywhere."""
    for module in model.modules():
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                monkeypatch.setattr(module, name, 0.2)
    model.train()
    yield model
    model.eval()
    model.gradient_checkpointing_disable()
    del model.runner


def loss_and_gradients(model, batches, seed: int = 4) -> tuple[float, list[torch.Tensor]]:
    """With dropout of this seed, to the bit."""
    model.zero_grad()
    torch.manual_seed(seed)
    total = sum(engine_loss(model, batch) for batch in batches)
    total.backward()
    return float(total.detach()), [p.grad.clone() for p in model.parameters()]


def saved_bytes(model, batches) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = sum(engine_loss(model, batch) for batch in batches)
    assert total.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("space", "mask"), cases()[:3])
def test_recomputed_layers_are_the_same_to_the_bit(learning, space, mask, packed):
    """Dropout included: the backward pass drops what the forward pass has dropped."""
    source = marked_sequences()
    batches = batches_of(whole_step(source, space), source, layout(90), mask, packed=packed)
    loss, gradients = loss_and_gradients(learning, batches)
    assert loss != loss_and_gradients(learning, batches, seed=5)[0]
    kept = saved_bytes(learning, batches)
    choose_layers(learning, compiled=False, recompute=True)
    again, other = loss_and_gradients(learning, batches)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, other, strict=True))
    assert saved_bytes(learning, batches) < 0.7 * kept


def test_outside_of_training_nothing_is_computed_twice(model):
    runner = LayerRunner(recompute=True)
    source = marked_sequences()
    (batch,) = batches_of(whole_step(source, "last"), source, packed=True)
    calls = []
    runner.encoder_layer = lambda layer, hidden, packing: calls.append(layer) or hidden
    with torch.inference_mode():
        runner.encode(model.model.encoder.layers[0], torch.ones(4, 16), batch.packing)
    assert len(calls) == 1


@pytest.mark.slow
def test_compiled_layers_have_the_numbers_of_the_plain_ones(model):
    source = marked_sequences()
    samples = whole_step(source, "every-prefix")
    sizes = [batches_of(samples[:n], source, layout(90), packed=True) for n in (10, 25, 40)]
    plain = [loss_and_gradients(model, batches) for batches in sizes]
    choose_layers(model, compiled=True, recompute=False)
    try:
        for batches, (loss, gradients) in zip(sizes, plain, strict=True):
            other_loss, other = loss_and_gradients(model, batches)
            assert other_loss == pytest.approx(loss, rel=1e-5)
            for a, b in zip(gradients, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    finally:
        del model.runner
