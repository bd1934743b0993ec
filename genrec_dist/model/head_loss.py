"""The loss of the output head: summed cross-entropy, with all logits at once or in chunks."""

# n label tokens, c rows of a chunk, D width, V vocabulary

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import SoftTargets
from genrec_dist.model.network import product_dtype

CPU_LOGITS_AT_ONCE, GPU_LOGITS_AT_ONCE = 2**25, 2**27
"""Most logits that the chunked loss holds at one time, whatever the number of target tokens."""
LOGITS_IN_CACHE = 2**22
"""On a CPU the products of a chunk of these stay in its last cache from one matrix product to the
next (docs/log.md)."""
LOGITS_IN_CORE = 2**18
"""What a core goes over some ten times, in float32, without leaving its own cache: a quarter less
time for a step's loss."""


def target_loss(
    logits_nV: Tensor, labels_n: Tensor, num_target_tokens: int, label_smoothing: float = 0.0
) -> Tensor:
    """The sum of the tokens' cross-entropies over `num_target_tokens`, a float32 scalar.

    Divided by the target tokens of the whole step, not of the micro-batch, the gradient does not
    depend on how the step is split."""
    return summed_loss(logits_nV, labels_n, label_smoothing) / max(num_target_tokens, 1)


def summed_loss(logits_nV: Tensor, labels_n: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The sum of the tokens' cross-entropies, a float32 scalar."""
    return F.cross_entropy(
        logits_nV.float(), labels_n, reduction="sum", label_smoothing=label_smoothing
    )


def head_loss(
    hidden_nD: Tensor,
    weight_VD: Tensor,
    labels_n: Tensor,
    label_smoothing: float = 0.0,
    how: HeadLoss = "full",
) -> Tensor:
    """`summed_loss` of the logits `hidden @ weight.T`.

    Args:
        hidden_nD: states of the label tokens.
        weight_VD: of the head.
        labels_n: int64.
        label_smoothing: share of the uniform distribution.
        how: full: by way of all logits; chunked, liger: without ever holding them all.
    """
    if how == "full":
        return summed_loss(F.linear(hidden_nD, weight_VD), labels_n, label_smoothing)
    if how == "liger" and len(labels_n):  # a dummy batch has no rows, and a kernel no grid
        # Liger-Kernel's Triton kernels; sums over chunks in float32, as in ours.
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        summed = LigerFusedLinearCrossEntropyLoss(
            label_smoothing=label_smoothing, reduction="sum", accum_dtype=torch.float32
        )
        fused: Tensor = summed(weight_VD, hidden_nD, labels_n)
        return fused
    dtype = product_dtype(hidden_nD)
    total: Tensor = ChunkedLoss.apply(hidden_nD, weight_VD, labels_n, label_smoothing, dtype)
    return total


def soft_difference(
    hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, soft: SoftTargets
) -> Tensor:
    """What soft targets add to the summed cross-entropy of the labels: the normaliser is the same
    for both, so only the logits differ. Arguments are those of `head_loss`, and `soft`, the targets
    of each label."""
    with torch.autocast(hidden_nD.device.type, enabled=False):
        shares_nK = soft.shares_nK.to(weight_VD.dtype)
        soft_nD = F.embedding_bag(
            soft.tokens_nK, weight_VD, mode="sum", per_sample_weights=shares_nK
        )
        hard_nD = F.embedding(labels_n, weight_VD) * shares_nK.sum(1, keepdim=True)
        return (hidden_nD.to(weight_VD.dtype) * (hard_nD - soft_nD)).sum()


def resolve_head(how: HeadLoss | Literal["auto"], device: torch.device) -> HeadLoss:
    """What `auto` means on a device. Raises ValueError for a way that this machine lacks."""
    if how == "auto":
        return "chunked" if device.type == "cpu" else "full"
    if how != "liger":
        return how
    if device.type != "cuda":
        raise ValueError(
            f"head liger: its kernels run on a GPU and this run is on {device.type}: set head to "
            "chunked"
        )
    if find_spec("liger_kernel") is None:
        raise ValueError(
            "head liger: liger-kernel is not installed: pip install 'genrec-dist[liger]', or set "
            "head to chunked"
        )
    return how


class ChunkedLoss(torch.autograd.Function):
    """The summed cross-entropy of a linear head, some rows at a time.

    The loss is the last operation but for a scalar factor, so a chunk's gradients are known once
    its logits are, and nothing is computed twice: forward leaves the gradients of hidden states and
    weight, backward multiplies them by the factor. Sums over chunks are taken in float32 (float64
    for float64 inputs)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: Tensor,
        weight_VD: Tensor,
        labels_n: Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
        rows_at_once: int | None = None,
    ) -> Tensor:
        """`dtype`: of the matrix products. Rows without a label are the caller's to leave out."""
        exact = torch.promote_types(hidden_nD.dtype, torch.float32)
        rows = rows_at_once or chunk_rows(len(weight_VD), weight_VD.shape[1], hidden_nD.device)
        rows = min(rows, max(len(labels_n), 1))
        loss = torch.zeros((), dtype=exact, device=hidden_nD.device)
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        hidden_grad_nD = torch.empty_like(hidden_nD, dtype=exact) if of_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=exact) if of_weight else None
        with torch.autocast(hidden_nD.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            # Written again and again: fresh memory of this size costs as much as what is done to
            # it.
            products = torch.empty(rows, len(weight), dtype=dtype, device=weight.device)
            rows_exact = exact_rows(rows, len(weight), weight.device)
            room = (
                products
                if dtype == exact
                else products.new_empty(rows_exact, len(weight), dtype=exact)
            )
            for hidden_cD, labels_c, grad_cD in zip(
                hidden_nD.to(dtype).split(rows),
                labels_n.split(rows),
                (labels_n if hidden_grad_nD is None else hidden_grad_nD).split(rows),
                strict=True,
            ):
                products_cV = products[: len(labels_c)]
                torch.mm(hidden_cD, weight.T, out=products_cV)
                for part, labels in zip(
                    products_cV.split(rows_exact), labels_c.split(rows_exact), strict=True
                ):
                    logits = part if dtype == exact else room[: len(part)].copy_(part)
                    loss += _loss_and_gradient_(logits, labels, label_smoothing)
                    if logits is not part:
                        part.copy_(logits)
                if of_hidden:
                    grad_cD.copy_(products_cV @ weight)
                if weight_grad_VD is None:
                    continue
                if dtype == exact:
                    weight_grad_VD.addmm_(products_cV.T, hidden_cD)
                else:
                    weight_grad_VD += products_cV.T @ hidden_cD
        ctx.save_for_backward(hidden_grad_nD, weight_grad_VD)
        ctx.dtypes = hidden_nD.dtype, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: a graph may be gone through twice. Rounded after the factor, once.
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in gradients
        )
        return *scaled, None, None, None, None


def chunk_rows(num_tokens: int, width: int, device: torch.device) -> int:
    """Rows of logits over so many tokens that are held at one time."""
    if device.type != "cpu":
        return max(1, GPU_LOGITS_AT_ONCE // num_tokens)
    # Each chunk adds to the whole gradient of the weight: with fewer rows than that is wide, this
    # is most of the work.
    return max(
        1, min(CPU_LOGITS_AT_ONCE // num_tokens, max(2 * width, LOGITS_IN_CACHE // num_tokens))
    )


def exact_rows(rows: int, num_tokens: int, device: torch.device) -> int:
    """Of a chunk's rows, those that are gone over in float32 at one time."""
    return rows if device.type != "cpu" else min(rows, max(1, LOGITS_IN_CORE // num_tokens))


def _loss_and_gradient_(logits_cV: Tensor, labels_c: Tensor, label_smoothing: float) -> Tensor:
    """The summed loss; its gradient, predicted less target distribution, replaces the logits."""
    labels_c1 = labels_c[:, None]
    target_c = logits_cV.gather(1, labels_c1)[:, 0]
    if label_smoothing:
        target_c = (1 - label_smoothing) * target_c + label_smoothing * logits_cV.mean(1)
    largest_c = logits_cV.amax(1)
    total_c = logits_cV.sub_(largest_c[:, None]).exp_().sum(1)
    logits_cV.mul_(total_c.reciprocal()[:, None])
    if label_smoothing:
        logits_cV.sub_(label_smoothing / logits_cV.shape[1])
    minus_c1 = torch.full_like(labels_c1, label_smoothing - 1, dtype=logits_cV.dtype)
    logits_cV.scatter_add_(1, labels_c1, minus_c1)
    return (largest_c + total_c.log() - target_c).sum()
