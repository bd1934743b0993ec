"""Attention over packed sequences: by a kernel for ragged sequences where the device has one, by
rectangles of like length elsewhere."""

# n query tokens, k key tokens, H heads, d width of a head, c sequences of a group, Q and K their
# lengths

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from genrec_dist.data.packing import Attended, Group, GroupTokens

LONG_ON_CPU = 128
"""Length of a rectangle from which a CPU multiplies bf16 inputs in bf16, shorter ones in float32.
For each new shape oneDNN first prepares a product in bf16, which takes as long as a thousand short
ones (docs/log.md)."""

WIDEST_RAGGED = 256
"""Widest head of the kernel for ragged sequences, which takes multiples of 8."""


@torch.compiler.disable
def attend(
    query_nHd: Tensor,
    key_kHd: Tensor,
    value_kHd: Tensor,
    attended: Attended,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q K^T * scale) V within each pair of sequences, [n, H, d].

    Args:
        query_nHd: queries of all sequences.
        key_kHd: keys of all sequences.
        value_kHd: their values.
        attended: where sequences start and end, and what a query sees.
        scale: of the scores.
        dropout: of the weights; 0 outside of training.
    """
    if not has_varlen(query_nHd) or dropout or not attended.by_whole_sequences:
        if attended.marks is not None:
            return by_mask(query_nHd, key_kHd, value_kHd, attended.seen_nk, scale, dropout)
        mixed: Tensor = ByRectangles.apply(query_nHd, key_kHd, value_kHd, attended, scale, dropout)
        return mixed
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = attended.queries, attended.keys
    window = (-1, 0) if attended.causal else (-1, -1)
    packed = (query_nHd, key_kHd, value_kHd, queries.cu_seqlens, keys.cu_seqlens)
    ragged = varlen_attn(*packed, queries.longest, keys.longest, scale=scale, window_size=window)
    assert isinstance(ragged, Tensor)
    return ragged


def by_mask(
    query_nHd: Tensor,
    key_kHd: Tensor,
    value_kHd: Tensor,
    seen_nk: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """`attend` as one attention of all queries to all keys, whose shapes are those of the packed
    arrays alone: for small micro-batches of one size."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query_nHd, key_kHd, value_kHd))
    mixed_1Hnd = F.scaled_dot_product_attention(
        query, key, value, seen_nk, dropout_p=dropout, scale=scale
    )
    return mixed_1Hnd[0].transpose(0, 1)


def has_varlen(query: Tensor) -> bool:
    """Whether torch's kernel for ragged sequences (flash attention) takes such queries, [.., d]."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and width % 8 == 0
        and width <= WIDEST_RAGGED
        and query.dtype in (torch.float16, torch.bfloat16)
        and find_spec("torch.nn.attention.varlen") is not None
    )


class ByRectangles(torch.autograd.Function):
    """One group of sequences after another, each as a padded rectangle. A group whose sequences
    have one length is copied without indices.

    Forward and backward are written out: each of some fifty groups of ten operations would
    otherwise be a node of the graph."""

    # Three sequences of 2, 2 and 1 tokens, H = 1: group 1 is sequences 0 and 1, group 2 sequence 2.
    #   query_nHd = [a b | c d | e] -> rectangles [[a b] [c d]] and [[e]]
    # Were they one group of length 2 (as few tokens are), the rectangle would be
    #   [[a b] [c d] [e -]], slots = [0 1 2 3 4], and the bias of keys [[0 0] [0 0] [0 -inf]].

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        ctx: Any,
        query_nHd: Tensor,
        key_kHd: Tensor,
        value_kHd: Tensor,
        attended: Attended,
        scale: float,
        dropout: float,
    ) -> Tensor:
        out_nHd = torch.empty_like(query_nHd)
        weights, kept = [], []
        for group in attended.groups_on(query_nHd.device):
            query, key, value = _rectangles(group, query_nHd, key_kHd, value_kHd)
            # Products and softmax in the inputs' type, as in backward, whatever autocast does.
            weights_cHQK = torch.matmul(query, key.transpose(2, 3)).mul_(scale)
            bias = _bias(group, attended.causal, weights_cHQK)
            if bias is not None:
                weights_cHQK += bias
            weights_cHQK = weights_cHQK.softmax(-1)
            weights.append(weights_cHQK)
            if dropout:
                keep = torch.empty_like(weights_cHQK, dtype=torch.bool)
                kept.append(keep.bernoulli_(1 - dropout))
                weights_cHQK = weights_cHQK * kept[-1] / (1 - dropout)
            _put(group.queries, out_nHd, torch.matmul(weights_cHQK, value))
        ctx.save_for_backward(query_nHd, key_kHd, value_kHd, *weights, *kept)
        ctx.attended, ctx.scale, ctx.dropout = attended, scale, dropout
        return out_nHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nHd: Tensor) -> tuple[Tensor | None, ...]:
        query_nHd, key_kHd, value_kHd, *saved = ctx.saved_tensors
        groups = ctx.attended.groups_on(query_nHd.device)
        kept = saved[len(groups) :] or [None] * len(groups)
        grads = [torch.empty_like(tensor) for tensor in (query_nHd, key_kHd, value_kHd)]
        if sum(group.keys.number for group in groups) < len(key_kHd):  # keys without a query
            grads = [grad.zero_() for grad in grads]
        for group, weights_cHQK, kept_cHQK in zip(groups, saved, kept, strict=False):
            query, key, value = _rectangles(group, query_nHd, key_kHd, value_kHd)
            grad = _take(group.queries, grad_nHd, group)
            grad_weights = torch.matmul(grad, value.transpose(2, 3))
            used_cHQK = weights_cHQK
            if kept_cHQK is not None:
                used_cHQK = weights_cHQK * kept_cHQK / (1 - ctx.dropout)
                grad_weights = grad_weights * kept_cHQK / (1 - ctx.dropout)
            grad_scores = torch._softmax_backward_data(
                grad_weights, weights_cHQK, -1, weights_cHQK.dtype
            ).mul_(ctx.scale)
            _put(group.queries, grads[0], torch.matmul(grad_scores, key))
            _put(group.keys, grads[1], torch.matmul(grad_scores.transpose(2, 3), query))
            _put(group.keys, grads[2], torch.matmul(used_cHQK.transpose(2, 3), grad))
        return *grads, None, None, None


def _rectangles(
    group: Group, query_nHd: Tensor, key_kHd: Tensor, value_kHd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _take(group.queries, query_nHd, group),
        _take(group.keys, key_kHd, group),
        _take(group.keys, value_kHd, group),
    )


def _take(part: GroupTokens, packed_nHd: Tensor, group: Group) -> Tensor:
    """A group's tokens as [c, H, L, d], zeros where a sequence is shorter than the rectangle."""
    tokens = packed_nHd[part.first : part.first + part.number]
    if part.slots is not None:
        padded = tokens.new_zeros(group.size * part.longest, *tokens.shape[1:])
        tokens = padded.index_copy_(0, part.slots, tokens)
    by_head = tokens.view(group.size, part.longest, *tokens.shape[1:]).transpose(1, 2)
    dtype = by_head.dtype
    if by_head.device.type == "cpu" and dtype == torch.bfloat16:
        longest = max(group.queries.longest, group.keys.longest)
        dtype = torch.float32 if longest < LONG_ON_CPU else dtype
    return torch.empty(by_head.shape, dtype=dtype, device=by_head.device).copy_(by_head)


def _put(part: GroupTokens, packed_nHd: Tensor, rectangle_cHLd: Tensor) -> None:
    """Copy a rectangle's tokens back into the packed array."""
    by_token = rectangle_cHLd.transpose(1, 2)
    tokens = packed_nHd[part.first : part.first + part.number]
    if part.slots is None:
        tokens.view(by_token.shape).copy_(by_token)
    else:
        slots = by_token.reshape(-1, *tokens.shape[1:])
        tokens.copy_(slots.index_select(0, part.slots))


def _bias(group: Group, causal: bool, like: Tensor) -> Tensor | None:
    """What is added to the scores: -inf for keys that a query must not see."""
    seen, (queries, keys), device = None, (group.queries, group.keys), like.device
    if keys.slots is not None:
        seen = torch.zeros(group.size * keys.longest, dtype=torch.bool, device=device)
        seen.index_fill_(0, keys.slots, True)
        seen = seen.view(group.size, 1, 1, keys.longest)
    if group.visible_cQ is not None:
        # What can be seen is within the sequence, so this excludes its padding too.
        visible = group.visible_cQ[:, None, :, None]
        seen = torch.arange(keys.longest, device=device) < visible
        if group.branch_cQ is not None:
            own = group.branch_cQ[:, :, None] == group.branch_cQ[:, None]
            seen = seen | own.tril()[:, None]
    if causal:
        # Padding is after a sequence's end, so causality excludes it too.
        ones = torch.ones(queries.longest, keys.longest, dtype=torch.bool, device=device)
        seen = ones.tril()
    return None if seen is None else like.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)
