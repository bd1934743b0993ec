"""The chunked head: value and gradient of the full one, and never all logits at once."""

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
from genrec_dist.model import head_loss as module
from genrec_dist.model.genrec import choose_loss
from genrec_dist.model.head_loss import ChunkedLoss, chunk_rows, head_loss, resolve_head
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup

ROWS, TOKENS, WIDTH = 23, 41, 8


def inputs(
    dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(ROWS, WIDTH, generator=dice, dtype=torch.float64)
        .mul(scale)
        .to(dtype)
        .requires_grad_()
    )
    weight = (
        torch.randn(TOKENS, WIDTH, generator=dice, dtype=torch.float64).to(dtype).requires_grad_()
    )
    return hidden, weight, torch.randint(0, TOKENS, (ROWS,), generator=dice)


def gradients(
    total: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return total.detach(), *torch.autograd.grad(total / 7, (hidden, weight))


@pytest.fixture
def five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the rows do not divide into."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 5)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_its_gradient_is_the_derivative(rows_at_once: int, smoothing: float) -> None:
    hidden, weight, labels = inputs(torch.float64)
    hidden, weight = (
        tensor.detach()[:rows].requires_grad_() for tensor, rows in ((hidden, 7), (weight, 11))
    )
    labels = labels[:7] % 11

    def summed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = ChunkedLoss.apply(
            hidden, weight, labels, smoothing, torch.float64, rows_at_once
        )
        return total

    assert torch.autograd.gradcheck(summed, (hidden, weight))
    expected = F.cross_entropy(
        hidden @ weight.T, labels, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(summed(hidden, weight), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.usefixtures("five_rows")
def test_it_is_the_full_head_to_rounding(smoothing: float, scale: float) -> None:
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


@pytest.mark.parametrize("case", ["autocast", "bfloat16 weights"])
@pytest.mark.usefixtures("five_rows")
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_full_head(case: str) -> None:
    autocast = case == "autocast"
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
        errors.append(
            [
                float((one.double() - other).norm() / other.norm())
                for one, other in zip(found, truth, strict=True)
            ]
        )
    for full, chunked in zip(*errors, strict=True):
        assert chunked <= 1.2 * full + 1e-4, errors


@pytest.mark.usefixtures("five_rows")
def test_no_tensor_of_all_logits_is_made() -> None:
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
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(50265, 768, cpu) * 50265 <= 2**25 < 2 * chunk_rows(50265, 768, cpu) * 50265
    assert chunk_rows(16384, 128, cpu) == 256
    assert chunk_rows(1103, 768, cpu) > 2 * 768
    assert chunk_rows(2**40, 768, cpu) == chunk_rows(2**40, 768, gpu) == 1


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, labels = inputs()
    expected = gradients(head_loss(hidden, weight, labels), hidden, weight)
    (of_hidden,) = torch.autograd.grad(
        head_loss(hidden, weight.detach(), labels, how="chunked") / 7, hidden
    )
    (of_weight,) = torch.autograd.grad(
        head_loss(hidden.detach(), weight, labels, how="chunked") / 7, weight
    )
    torch.testing.assert_close((of_hidden, of_weight), expected[1:])
    with torch.no_grad():
        total = head_loss(hidden, weight, labels, how="chunked")
    assert not total.requires_grad
    torch.testing.assert_close(total, expected[0])


def test_a_graph_can_be_gone_through_twice() -> None:
    hidden, weight, labels = inputs()
    total = head_loss(hidden, weight, labels, how="chunked")
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(total * 2, (hidden, weight))
    torch.testing.assert_close(list(first), kept)
    torch.testing.assert_close([grad / 2 for grad in second], kept)


def test_no_rows_add_nothing_and_still_have_gradients() -> None:
    hidden, weight, labels = inputs()
    for how in ("full", "chunked", "liger"):
        total = head_loss(hidden[:0], weight, labels[:0], 0.1, how)
        of_hidden, of_weight = torch.autograd.grad(total, (hidden, weight))
        assert total.item() == 0.0
        assert not of_hidden.any()
        assert not of_weight.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("five_rows")
def test_what_is_no_number_stays_so(bad: float) -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[13, 2] = bad
    assert not head_loss(hidden, weight, labels, how="chunked").isfinite()


def test_liger_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(
        ValueError,
        match=r"^head liger: its kernels run on a GPU and this run is on cpu: set head to chunked$",
    ):
        resolve_head("liger", torch.device("cpu"))
    model, _ = model_on_cpu("fp32")
    with pytest.raises(ValueError, match="head liger"):
        choose_loss(model, "liger")


def test_what_auto_means() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (resolve_head("auto", cpu), resolve_head("auto", gpu)) == ("chunked", "full")
    assert (resolve_head("full", cpu), resolve_head("chunked", gpu)) == ("full", "chunked")
    assert load_recipe("tiny").head == "auto"


def test_a_run_learns_the_same_by_either(tiny_data: Path, tmp_path: Path) -> None:
    """Several micro-batches a step, label smoothing, and the head's weight tied to the
    embedding."""
    shape = "model={d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 64, dropout: 0.0}"
    recipe = load_recipe(
        "tiny",
        [f"data={tiny_data}", f"run={tmp_path}", "precision=fp32", "micro_batch_tokens=512", "workers=0", shape,
         "tokens.vocab_size=285", "finetune.batch_size=100", "finetune.label_smoothing=0.1", "optimizer.eps=1e-4"],
    )  # fmt: skip
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
def test_on_a_gpu_it_is_the_full_head_to_rounding(how: HeadLoss, autocast: bool) -> None:
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
