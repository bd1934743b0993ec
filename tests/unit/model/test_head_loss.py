"""The loss of the head: cross-entropy over all target tokens of the step, however it is split; in
chunks the value and gradient of the full one, and never all logits at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_model import model_on_cpu
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import HeadLoss
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.model import head_loss as module
from genrec_dist.model.genrec import choose_loss
from genrec_dist.model.head_loss import (
    ChunkedLoss,
    chunk_rows,
    head_loss,
    resolve_head,
    target_loss,
)
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup

ROWS, TOKENS, WIDTH = 23, 41, 8
DICE = torch.Generator().manual_seed(0)
LOGITS = torch.randn(12, 9, generator=DICE, dtype=torch.float64)
LABELS = torch.randint(0, 9, (12,), generator=DICE)
CPU, GPU = torch.device("cpu"), torch.device("cuda")

by_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.2])


# The loss of given logits.


@by_smoothing
def test_target_loss_is_cross_entropy_mixed_with_the_uniform_law(smoothing: float) -> None:
    logprobs = LOGITS.float().log_softmax(-1)
    own, uniform = logprobs[torch.arange(12), LABELS], logprobs.mean(-1)
    expected = -((1 - smoothing) * own + smoothing * uniform).mean()
    torch.testing.assert_close(target_loss(LOGITS, LABELS, 12, smoothing), expected)
    # Half-precision logits are summed in fp32.
    low = target_loss(LOGITS.bfloat16(), LABELS, 12, smoothing)
    assert low.dtype == torch.float32
    exact = target_loss(LOGITS.bfloat16().double(), LABELS, 12, smoothing)
    torch.testing.assert_close(low, exact)


@by_smoothing
def test_the_parts_of_a_step_add_up_in_value_and_gradient(smoothing: float) -> None:
    whole, split = (LOGITS.float().requires_grad_() for _ in range(2))
    total = target_loss(whole, LABELS, 12, smoothing)
    parts = (slice(0, 5), slice(5, 5), slice(5, 12))
    added = sum(target_loss(split[part], LABELS[part], 12, smoothing) for part in parts)
    torch.testing.assert_close(added, total)
    total.backward()
    added.backward()
    torch.testing.assert_close(split.grad, whole.grad)


# The chunked head.


def inputs(
    dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, WIDTH, generator=dice, dtype=torch.float64) for rows in (ROWS, TOKENS)
    )
    hidden = hidden.mul(scale).to(dtype).requires_grad_()
    labels = torch.randint(0, TOKENS, (ROWS,), generator=dice)
    return hidden, weight.to(dtype).requires_grad_(), labels


def gradients(
    total: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return total.detach(), *torch.autograd.grad(total / 7, (hidden, weight))


@pytest.fixture
def five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the rows do not divide into."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 5)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
@by_smoothing
def test_the_chunked_gradient_is_the_derivative(rows_at_once: int, smoothing: float) -> None:
    hidden, weight, labels = inputs(torch.float64)
    hidden, weight = (each.detach()[:n].requires_grad_() for each, n in ((hidden, 7), (weight, 11)))
    labels = labels[:7] % 11

    def summed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options = (smoothing, torch.float64, rows_at_once)
        total: torch.Tensor = ChunkedLoss.apply(hidden, weight, labels, *options)
        return total

    assert torch.autograd.gradcheck(summed, (hidden, weight))
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(summed(hidden, weight), expected, rtol=1e-12, atol=0)


@by_smoothing
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.usefixtures("five_rows")
def test_the_chunked_head_is_the_full_one_to_rounding(smoothing: float, scale: float) -> None:
    """Also where the model is so sure that a softmax without its largest logit taken away would
    overflow."""
    hidden, weight, labels = inputs(scale=scale)
    full, chunked = (
        gradients(head_loss(hidden, weight, labels, smoothing, how), hidden, weight)
        for how in ("full", "chunked")
    )
    for expected, found in zip(full, chunked, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
@pytest.mark.usefixtures("five_rows")
def test_in_bfloat16_the_chunked_head_is_as_exact_as_the_full_one(autocast: bool) -> None:
    hidden, weight, labels = inputs(torch.float32 if autocast else torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = gradients(F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum"), *exact)
    errors = []
    for how in ("full", "chunked"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = head_loss(hidden, weight, labels, 0.0, how)
        assert total.dtype == torch.float32
        found = gradients(total, hidden, weight)
        assert [grad.dtype for grad in found[1:]] == [hidden.dtype, weight.dtype]
        pairs = zip(found, truth, strict=True)
        errors.append([float((one.double() - true).norm() / true.norm()) for one, true in pairs])
    for full, chunked in zip(*errors, strict=True):
        assert chunked <= 1.2 * full + 1e-4, errors


@pytest.mark.usefixtures("five_rows")
def test_the_chunked_head_makes_no_tensor_of_all_logits() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return made

    hidden, weight, labels = inputs()
    largest = {}
    for how in ("full", "chunked"):
        with Largest() as seen:
            head_loss(hidden, weight, labels, 0.1, how).backward()
        largest[how] = seen.numel
    assert largest["full"] >= ROWS * TOKENS
    assert largest["chunked"] <= max(5 * TOKENS, WIDTH * TOKENS)


def test_a_chunk_is_bounded_and_wide_enough_to_be_worth_its_sum() -> None:
    assert chunk_rows(50265, 768, CPU) * 50265 <= 2**25 < 2 * chunk_rows(50265, 768, CPU) * 50265
    assert chunk_rows(16384, 128, CPU) == 256
    assert chunk_rows(1103, 768, CPU) > 2 * 768
    assert chunk_rows(2**40, 768, CPU) == chunk_rows(2**40, 768, GPU) == 1


def test_the_chunked_head_gives_gradients_where_needed_and_as_often() -> None:
    hidden, weight, labels = inputs()
    expected = gradients(head_loss(hidden, weight, labels), hidden, weight)

    def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return head_loss(hidden, weight, labels, how="chunked")

    (of_hidden,) = torch.autograd.grad(chunked(hidden, weight.detach()) / 7, hidden)
    (of_weight,) = torch.autograd.grad(chunked(hidden.detach(), weight) / 7, weight)
    torch.testing.assert_close((of_hidden, of_weight), expected[1:])
    with torch.no_grad():
        total = chunked(hidden, weight)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected[0])
    # A graph can be used twice.
    total = chunked(hidden, weight)
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(total * 2, (hidden, weight))
    torch.testing.assert_close(list(first), kept)
    torch.testing.assert_close([grad / 2 for grad in second], kept)


@pytest.mark.parametrize("how", ["full", "chunked", "liger"])
def test_no_rows_add_nothing_and_still_have_gradients(how: HeadLoss) -> None:
    hidden, weight, labels = inputs()
    total = head_loss(hidden[:0], weight, labels[:0], 0.1, how)
    assert total.item() == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["full", "chunked"])
@pytest.mark.usefixtures("five_rows")
def test_what_is_no_number_stays_so(bad: float, how: HeadLoss) -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[13, 2] = bad
    assert not head_loss(hidden, weight, labels, how=how).isfinite()


def test_resolve_head_refuses_liger_where_it_cannot_run() -> None:
    reason = "its kernels run on a GPU and this run is on cpu: set head to chunked"
    with pytest.raises(ValueError, match=f"^head liger: {reason}$"):
        resolve_head("liger", CPU)
    model, _ = model_on_cpu("fp32")
    with pytest.raises(ValueError, match="head liger"):
        choose_loss(model, "liger")
    assert (resolve_head("auto", CPU), resolve_head("auto", GPU)) == ("chunked", "full")
    assert (resolve_head("full", CPU), resolve_head("chunked", GPU)) == ("full", "chunked")
    assert load_recipe("tiny").head == "auto"


def test_a_run_learns_the_same_with_either_head(tiny_data: Path, tmp_path: Path) -> None:
    """Several micro-batches per step, label smoothing, and the head's weight tied to the
    embedding."""
    tower = "encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32"
    settings = [
        f"data={tiny_data}",
        f"run={tmp_path}",
        "precision=fp32",
        "micro_batch_tokens=512",
        "workers=0",
        f"model={{d_model: 16, {tower}, max_tokens: 64, dropout: 0.0}}",
        "tokens.vocab_size=285",
        "finetune.batch_size=100",
        "finetune.label_smoothing=0.1",
        "optimizer.eps=1e-4",
    ]
    recipe = load_recipe("tiny", settings)
    losses = {}
    for how in ("full", "chunked"):
        setup, model = build_setup(replace(recipe, head=how))
        loop = Loop(setup, model, make_accelerator(recipe))
        assert model.loss_by == how
        data, losses[how] = StepBatches(setup.stages, setup.reader, setup.layout, recipe, 0, 1), []
        for step in range(5):
            share = data[step]
            assert len(share.micro_batches) > 1
            losses[how].append(
                float(loop.take_step(step, share, loop.step_totals(share), recipe.finetune, 1.0)[0])
            )
    assert losses["full"][-1] < losses["full"][0]
    assert losses["chunked"] == pytest.approx(losses["full"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["chunked", "liger"])
def test_on_a_gpu_each_head_is_the_full_one_to_rounding(how: HeadLoss, autocast: bool) -> None:
    if how == "liger":
        pytest.importorskip("liger_kernel")
    hidden, weight, labels = (tensor.detach().cuda() for tensor in inputs())
    found = {}
    for way in ("full", how):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            total = head_loss(*leaves, labels, 0.1, way)
        found[way] = gradients(total, *leaves)
    tolerance = 2e-2 if autocast else 2e-5
    for one, other in zip(found[how], found["full"], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
