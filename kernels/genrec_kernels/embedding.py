"""The embedding sum as the model calls it: the Triton kernel where there is one, plain torch
elsewhere."""

# B users, L input tokens, n places, D width, F width of a factorised id table

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_kernels import ops
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import GradientOrder, Rows, check_rows, make_gradient_order
from genrec_kernels.torch_reference import EmbeddingTables

Implementation = Literal["reference", "triton"]

SWITCH = "GENREC_KERNELS"
"""The environment variable that overrules the choice by device."""

_TRITON = importlib.util.find_spec("triton") is not None
_WIDEST = 8192
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger("genrec_kernels")
_logged: set[str] = set()
_launched: list[str] = []
"""What `launch_problem` has found, once it has tried."""


def chosen(device_type: str) -> Implementation:
    """What computes the sum on such a device; logged once. Raises ValueError where
    GENREC_KERNELS asks for what this machine does not have."""
    setting = os.environ.get(SWITCH, "")
    if setting not in ("", "reference", "triton"):
        choices = "it is reference, triton, or unset for a choice by device"
        raise ValueError(f"{SWITCH}={setting}: {choices}")
    if setting == "triton" and not _TRITON:
        remedy = "pip install 'genrec-dist[kernels]' or unset it"
        raise ValueError(f"{SWITCH}=triton: triton is not installed; {remedy}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if setting == "triton" and device_type != "cuda" and not interpreted:
        remedy = "unset it, or set TRITON_INTERPRET=1"
        raise ValueError(f"{SWITCH}=triton: there is no Triton for {device_type}; {remedy}")
    use_triton = setting == "triton" or (not setting and device_type == "cuda" and _TRITON)
    problem = launch_problem() if use_triton and device_type == "cuda" and not interpreted else ""
    if problem and setting:
        raise ValueError(f"{SWITCH}=triton: {problem}; unset it for plain torch")
    use_triton = use_triton and not problem
    if problem:
        reason = f", {problem}"
    elif setting:
        reason = f" ({SWITCH}={setting})"
    elif use_triton:
        reason = ""
    else:
        reason = (
            ", the kernel is for CUDA" if device_type != "cuda" else ", triton is not installed"
        )
    name = "Triton kernel" if use_triton else "plain torch"
    _log_once(f"embedding sum on {device_type}: {name}{reason}")
    return "triton" if use_triton else "reference"


def launch_problem() -> str:
    """Why Triton launches no kernel on this machine's GPU, in one line; "" where it does. Tried
    once in a process: Triton compiles a launcher with the machine's C compiler, which slim
    containers and compute nodes lack."""
    if not _launched:
        _launched.append(_try_launch())
    return _launched[0]


# As torch.compiler.assume_constant_result marks it, which would load all of the compiler here.
launch_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _try_launch() -> str:
    try:
        from genrec_kernels.triton_embedding_sum import launch_one

        launch_one()
    except Exception as error:  # whatever it is, plain torch does the work
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "it needs a C compiler and Python's headers (apt-get install gcc python3-dev)"
        return f"Triton does not launch here ({reason}): {remedy}"
    return ""


def wants_gradient_order(device_type: str) -> bool:
    """Whether a training batch for this device should bring a gradient order."""
    return chosen(device_type) == "triton"


def embedding_sum(
    token_ids_BL: Tensor,
    position_ids_BL: Tensor,
    user_rows_BL: Tensor,
    item_rows_BL: Tensor,
    tables: EmbeddingTables,
    *,
    training: bool = False,
    order: GradientOrder | None = None,
) -> Tensor:
    """`torch_reference.embedding_sum`, which says what it computes, by the kernel where it can.

    The kernel adds in float32 whatever the tables' types; its dropout is a function of a seed drawn
    from the device's generator, so its masks are not plain torch's. Plain torch computes float64,
    projections of tables larger than the batch, and a batch on a device that learns and brings no
    order; each is logged once.

    Args:
        token_ids_BL, position_ids_BL, user_rows_BL, item_rows_BL, tables, training: as there.
        order: for the backward of the kernel, by `make_gradient_order` with the same
            `pad_token_id`, and `position_offset` added to the positions; ids on the CPU get theirs
            here if it is None.

    Returns:
        float [B, L, D] in the token table's type.

    Raises:
        ValueError: an id on the CPU is outside its table; on a device nobody could look without
            waiting for it.
    """
    ids = (token_ids_BL, position_ids_BL, user_rows_BL, item_rows_BL)
    embeddings = (tables.token, tables.position, tables.user, tables.item)
    grad = torch.is_grad_enabled()
    learns = grad and any(table is not None and table.requires_grad for table in embeddings)
    on_host = not token_ids_BL.is_cuda and not torch.compiler.is_compiling()
    refusal = None
    if chosen(tables.token.device.type) == "triton":
        refusal = _refusal(tables, token_ids_BL.numel())
        if refusal is None and learns and order is None and not on_host:
            refusal = "a batch that learns and brings no gradient order"
        if refusal is not None:
            _log_once(f"embedding sum: plain torch for {refusal}")
    if refusal is not None or chosen(tables.token.device.type) == "reference":
        return reference.embedding_sum(*ids, tables, training=training)
    if on_host:
        # To check the ids is to read them, which on a device would wait for it.
        rows = _rows(ids, tables)
        for table_rows in rows:
            if table_rows is not None:
                check_rows(table_rows)
        if learns and order is None:
            order = make_gradient_order(rows)
    assert order is None or order.num_places == token_ids_BL.numel(), order
    users, items = tables.user, tables.item
    if users is not None and tables.user_projection is not None:
        users = F.linear(users.to(tables.user_projection.dtype), tables.user_projection)
    if items is not None and tables.item_projection is not None:
        items = F.linear(items.to(tables.item_projection.dtype), tables.item_projection)
    seed = None
    if training and tables.id_dropout > 0:
        seed = torch.randint(2**62, (1,), device=tables.token.device)
    norm_learns = grad and tables.norm_weight is not None and tables.norm_weight.requires_grad
    projected = replace(tables, user=users, item=items)
    return ops.embedding_sum(ids, projected, seed, order, keep=learns or norm_learns)


def _refusal(tables: EmbeddingTables, num_places: int) -> str | None:
    """What is beyond the kernel, if anything."""
    for table in (tables.token, tables.position, tables.user, tables.item):
        if table is not None and table.dtype not in _TYPES:
            return f"tables of {tables.token.dtype}"
    if tables.token.shape[1] > _WIDEST:
        return f"width {tables.token.shape[1]} above {_WIDEST}"
    for table, projection in (
        (tables.user, tables.user_projection),
        (tables.item, tables.item_projection),
    ):
        # The table is projected before it is looked up. That pays for fetched rows, which are never
        # more than the places.
        if table is not None and projection is not None and len(table) > num_places + 1:
            remedy = "fetched rows (optimizer.id_tables) can have the kernel"
            return f"factorised id tables within the model; {remedy}"
    return None


def _rows(ids: tuple[Tensor, ...], tables: EmbeddingTables) -> list[Rows | None]:
    tokens, positions, users, items = (rows.numpy() for rows in ids)
    user, item = tables.user, tables.item
    return [
        Rows("token", tokens, len(tables.token), tables.pad_token_id),
        Rows("position", positions + tables.position_offset, len(tables.position)),
        None if user is None else Rows("user", users, len(user), 0),
        None if item is None else Rows("item", items, len(item), 0),
    ]


def _log_once(line: str) -> None:
    if not torch.compiler.is_compiling() and line not in _logged:
        _logged.add(line)
        _log.info(line)
