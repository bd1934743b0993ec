"""Dropout: the share it drops, the scale it keeps, the gradient it gives, and that it is a function
of the seed."""

import pytest
import torch

from genrec_dist.model.dropout import add_dropped, drop, keep_mask


@pytest.mark.parametrize("share", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_the_share_is_the_requested_one_in_every_byte_of_a_word(share):
    torch.manual_seed(1)
    kept, factor = keep_mask(torch.Size([4_000_000]), share)
    assert factor == pytest.approx(1 / (1 - share), rel=2e-4)
    # Four decisions come of one word: each must be fair, and independent of its neighbour.
    spread = 4 * (share * (1 - share) / 1_000_000) ** 0.5
    for place in range(4):
        assert float((~kept[place::4]).double().mean()) == pytest.approx(share, abs=spread + 1e-5)
    both = (~kept[:-1] & ~kept[1:]).double().mean()
    assert float(both) == pytest.approx(share**2, abs=4 * (share**2 / 1_000_000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 11), (0, 4)])
def test_kept_values_are_scaled_and_dropped_ones_are_zero_forward_and_backward(shape, dtype):
    values = torch.rand(shape, dtype=dtype).add_(1).requires_grad_()
    out = drop(values, 0.25, True)
    assert out.dtype == dtype
    kept = out != 0
    torch.testing.assert_close(
        out[kept], values[kept] / 0.75, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(
        values.grad, kept.to(dtype) / 0.75, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )


def test_the_sum_is_the_sum_keeps_the_type_of_its_base_and_is_a_function_of_the_seed():
    base = torch.randn(50, 8, requires_grad=True)
    values = torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(5)
    total, other = (add_dropped(base, values, 0.3, True) for _ in range(2))
    assert not torch.equal(total, other)
    torch.manual_seed(5)
    kept, factor = keep_mask(values.shape, 0.3)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, base + values.float() * kept * factor)
    total.sum().backward()
    torch.testing.assert_close(base.grad, torch.ones(50, 8))
    torch.testing.assert_close(values.grad.float(), kept * factor, rtol=1e-2, atol=0)


def test_outside_of_training_nothing_is_dropped_and_nothing_is_drawn():
    values = torch.randn(9)
    before = torch.get_rng_state()
    assert drop(values, 0.5, False) is values
    assert drop(values, 0.0, True) is values
    assert torch.equal(add_dropped(values, values, 0.5, False), 2 * values)
    assert torch.equal(torch.get_rng_state(), before)
