"""The loss: cross-entropy over all target tokens of the step, however the step is cut."""

import pytest
import torch
from torch.nn import functional as F

from genrec_dist.model.head_loss import target_loss

torch.manual_seed(0)
LOGITS = torch.randn(12, 9, dtype=torch.float64)
LABELS = torch.randint(0, 9, (12,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_mean_cross_entropy_of_a_whole_step(smoothing):
    expected = F.cross_entropy(LOGITS.float(), LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(target_loss(LOGITS, LABELS, 12, smoothing), expected)


def test_it_is_minus_the_log_probability():
    expected = -LOGITS.float().log_softmax(-1)[torch.arange(12), LABELS].sum() / 12
    torch.testing.assert_close(target_loss(LOGITS, LABELS, 12), expected)


def test_label_smoothing_mixes_in_the_uniform_law():
    logprobs = LOGITS.float().log_softmax(-1)
    picked, uniform = logprobs[torch.arange(12), LABELS], logprobs.mean(-1)
    torch.testing.assert_close(
        target_loss(LOGITS, LABELS, 12, 0.3), -(0.7 * picked + 0.3 * uniform).mean()
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_parts_of_a_step_add_up_in_value_and_gradient(smoothing):
    whole = LOGITS.float().requires_grad_()
    target_loss(whole, LABELS, 12, smoothing).backward()
    cut = LOGITS.float().requires_grad_()
    losses = [
        target_loss(cut[part], LABELS[part], 12, smoothing) for part in (slice(0, 5), slice(5, 12))
    ]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), target_loss(whole, LABELS, 12, smoothing))
    torch.testing.assert_close(cut.grad, whole.grad)


def test_half_precision_logits_are_summed_in_fp32():
    loss = target_loss(LOGITS.bfloat16(), LABELS, 12)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS.bfloat16().float(), LABELS))


def test_a_part_without_targets_adds_nothing_and_still_has_a_gradient():
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = target_loss(logits, torch.zeros(0, dtype=torch.long), 0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(bad):
    logits = LOGITS.float().clone()
    logits[3, 4] = bad
    assert not torch.isfinite(target_loss(logits, LABELS, 12))
