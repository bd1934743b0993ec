"""The embedding sum as the model calls it: the Triton kernel where there is one, plain torch
elsewhere."""

# B users, L input tokens, n places, D width, F width of a factorised id table

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_kernels import ops
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import Rows, SumPlan, check_rows, plan_sum

Implementation = Literal["reference", "triton"]

SWITCH = "GENREC_KERNELS"
"""The environment variable that overrules the choice by device."""

_TRITON = importlib.util.find_spec("triton") is not None
_WIDEST = 8192
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger("genrec_kernels")
_said: set[str] = set()


def chosen(device_type: str) -> Implementation:
    """What computes the sum on such a device; said once. Raises ValueError if GENREC_KERNELS asks
    for what cannot be had."""
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "reference", "triton"):
        raise ValueError(
            f"{SWITCH}={asked}: it is reference, triton, or unset for a choice by device"
        )
    if asked == "triton":
        if not _TRITON:
            raise ValueError(
                f"{SWITCH}=triton: triton is not installed; pip install 'genrec-dist[kernels]' or unset it"
            )
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"{SWITCH}=triton: there is no Triton for {device_type}; unset it, or set TRITON_INTERPRET=1"
            )
        return _say("triton", f"embedding sum on {device_type}: Triton kernel ({SWITCH}=triton)")
    if asked == "reference":
        return _say(
            "reference", f"embedding sum on {device_type}: plain torch ({SWITCH}=reference)"
        )
    if device_type == "cuda" and _TRITON:
        return _say("triton", f"embedding sum on {device_type}: Triton kernel")
    why = "triton is not installed" if device_type == "cuda" else "the kernel is for CUDA"
    return _say("reference", f"embedding sum on {device_type}: plain torch, {why}")


def _say(implementation: Implementation, line: str) -> Implementation:
    if not torch.compiler.is_compiling() and line not in _said:
        _said.add(line)
        _log.info(line)
    return implementation


def wants_plan(device_type: str) -> bool:
    """Whether a training batch for this device should bring a plan."""
    return chosen(device_type) == "triton"


def embedding_sum(
    token_ids_BL: Tensor,
    position_ids_BL: Tensor,
    user_rows_BL: Tensor,
    item_rows_BL: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    user_table: Tensor | None,
    item_table: Tensor | None,
    *,
    scale: float = 1.0,
    position_offset: int = 0,
    id_dropout: float = 0.0,
    training: bool = False,
    pad_token_id: int | None = None,
    user_projection: Tensor | None = None,
    item_projection: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    plan: SumPlan | None = None,
) -> Tensor:
    """`reference.embedding_sum`, which says what it computes, by the kernel where it can: float [B,
    L, D].

    The kernel adds in float32 whatever the tables' types; its dropout is a function of a seed drawn
    from the device's generator, so its masks are not plain torch's. Its backward needs the batch's
    `plan` (`plan_sum`, with the same `pad_token_id`, and `position_offset` added to the positions);
    without one, ids on the CPU get theirs here and ids on a device go through plain torch. So do
    float64 and projections of tables larger than the batch, each said once. Raises ValueError for
    ids outside their tables where they lie on the CPU; on a device nobody can look without waiting
    for it."""
    ids = (token_ids_BL, position_ids_BL, user_rows_BL, item_rows_BL)
    tables = (token_table, position_table, user_table, item_table)
    learns = torch.is_grad_enabled() and any(
        table is not None and table.requires_grad for table in tables
    )
    if (
        chosen(token_table.device.type) == "reference"
        or _refused(tables, (user_projection, item_projection), token_ids_BL.numel())
        or _planless(learns, plan, token_ids_BL)
    ):
        return reference.embedding_sum(
            *ids, *tables, scale=scale, position_offset=position_offset, id_dropout=id_dropout, training=training,
            pad_token_id=pad_token_id, user_projection=user_projection, item_projection=item_projection,
            norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, plan=plan,
        )  # fmt: skip
    if not token_ids_BL.is_cuda and not torch.compiler.is_compiling():
        named = _named(ids, tables, position_offset, pad_token_id)
        for rows in named:
            if rows is not None:
                check_rows(rows)
        if learns and plan is None:
            first, second, *others = named
            assert first is not None
            assert second is not None
            plan = plan_sum(first, second, *others)
    assert plan is None or plan.num_places == token_ids_BL.numel(), (
        plan.num_places,
        token_ids_BL.shape,
    )
    users, items = (
        table
        if table is None or projection is None
        else F.linear(table.to(projection.dtype), projection)
        for table, projection in ((user_table, user_projection), (item_table, item_projection))
    )
    seed = None
    if training and id_dropout > 0:
        seed = torch.randint(2**62, (1,), device=token_table.device)
    out, _, _ = ops.embedding_sum(
        *(rows.contiguous() for rows in ids), token_table.contiguous(), position_table.contiguous(),
        None if users is None else users.contiguous(), None if items is None else items.contiguous(),
        norm_weight, norm_bias, seed, None if plan is None else plan.packed, [] if plan is None else plan.sizes(),
        scale, position_offset, id_dropout, norm_eps, learns or _learns(norm_weight),
    )  # fmt: skip
    return out


def _learns(parameter: Tensor | None) -> bool:
    return torch.is_grad_enabled() and parameter is not None and parameter.requires_grad


def _refused(
    tables: Sequence[Tensor | None], projections: Sequence[Tensor | None], num_places: int
) -> bool:
    """Whether this is beyond the kernel, which is then said."""
    token_table = tables[0]
    assert token_table is not None
    if any(table is not None and table.dtype not in _TYPES for table in tables):
        return _say_plain(f"tables of {token_table.dtype}")
    if token_table.shape[1] > _WIDEST:
        return _say_plain(f"width {token_table.shape[1]} above {_WIDEST}")
    for table, projection in zip(tables[2:], projections, strict=True):
        # The table is projected before it is looked up. That pays for fetched rows, which are never
        # more than the places.
        if table is not None and projection is not None and len(table) > num_places + 1:
            return _say_plain(
                "factorised id tables within the model; fetched rows (optimizer.id_tables) can have the kernel"
            )
    return False


def _planless(learns: bool, plan: SumPlan | None, token_ids: Tensor) -> bool:
    if learns and plan is None and (token_ids.is_cuda or torch.compiler.is_compiling()):
        return _say_plain("a batch that learns and brings no plan")
    return False


def _say_plain(what: str) -> bool:
    _say("reference", f"embedding sum: plain torch for {what}")
    return True


def _named(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    position_offset: int,
    pad_token_id: int | None,
) -> list[Rows | None]:
    names, silent = ("token", "position", "user", "item"), (pad_token_id, None, 0, 0)
    offsets = (0, position_offset, 0, 0)
    return [
        None if table is None else Rows(name, rows.numpy() + offset, len(table), row)
        for name, rows, table, row, offset in zip(names, ids, tables, silent, offsets, strict=True)
    ]
