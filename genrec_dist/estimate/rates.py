"""What a device and its host do in a second: published for cards, measured here for a CPU and for
the host of any."""

# n tokens, D width, F feed-forward width, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoderLayer

from genrec_dist.data.packing import Packing, segments_of
from genrec_dist.estimate.hardware import BANDWIDTHS, CARDS
from genrec_dist.model.dropout import add_dropped
from genrec_dist.model.packed_layers import encoder_layer

MFU = 0.4
"""Share of a card's published peak that matrix products of training are taken to reach."""
BANDWIDTH_SHARE = 0.8
"""Share of a card's published bandwidth that operators between them are taken to reach."""
LAUNCH_SECONDS = 3e-6
"""What a launch on a GPU is taken to add to the host's time for an operator."""
CPU = "CPU"
"""This machine's, in place of a card."""

PASSES = 5
"""Times that what backward needs of a micro-batch goes through memory: written and read on the way
there, its gradient written and read, and what is not kept."""

_TRIES = 3
_LARGE = 2**24  # elements: beyond any cache
_MOST_ROWS = 2048


@dataclass(frozen=True)
class Rates:
    """What one process can do."""

    flops: float
    """Floating-point operations of matrix products in a second."""
    bandwidth: float
    """Bytes a second of operators on a micro-batch's activations."""
    memory_bandwidth: float
    """Bytes a second of operators on all weights."""
    launch_seconds: float
    """Of the host, for one operator."""
    runs_ahead: bool
    """Whether the host issues operators while the device computes: then the slower of both decides,
    otherwise their times add up."""
    source: str
    """In words."""


def given_rates(tflops: float) -> Rates:
    """Of a device of which only the operations are known."""
    words = f"{tflops:g} TFLOP/s per GPU, as given, and no other limit"
    return Rates(tflops * 1e12, math.inf, math.inf, 0.0, True, words)


def card_rates(card: str, bf16: bool) -> Rates:
    """Of a card of `CARDS`, on a host like this machine."""
    peak, bandwidth = CARDS[card][bf16], BANDWIDTHS[card]
    host = host_seconds() + LAUNCH_SECONDS
    source = (
        f"published {peak:g} TFLOP/s x {MFU:g} and {bandwidth:,} GB/s x {BANDWIDTH_SHARE:g} "
        f"assumed; host {1e6 * host:.0f} us a launch, {1e6 * LAUNCH_SECONDS:.0f} of them assumed, "
        "the rest measured on this machine"
    )
    reached = bandwidth * BANDWIDTH_SHARE * 1e9
    return Rates(peak * MFU * 1e12, reached, reached, host, True, source)


def cpu_rates(products: Sequence[tuple[int, int, int, float]], width: int, bf16: bool) -> Rates:
    """Of this process's threads, measured now; takes some seconds for a large model.

    Args:
        products: (n, D, F, weight): how many operations, relative to each other, are in products
            of [n, D] by [D, F].
        width: D of the activations between them.
        bf16: whether the products have 16 bits.
    """
    seconds, operations = 0.0, 0.0
    for rows, inner, outer, weight in products:
        rows = min(rows, _MOST_ROWS)
        seconds += weight * _seconds_of_products(rows, inner, outer, bf16) / (rows * inner * outer)
        operations += weight * 6
    rows = max(min(products[0][0], _MOST_ROWS), 1)
    threads, host = torch.get_num_threads(), host_seconds()
    found = Rates(
        flops=operations / seconds,
        bandwidth=_block_bandwidth(rows, width, bf16),
        memory_bandwidth=_memory_bandwidth(),
        launch_seconds=host,
        runs_ahead=False,
        source="",
    )
    source = (
        f"measured here, {threads} thread{'s' * (threads > 1)}: {found.flops / 1e9:,.0f} GFLOP/s "
        f"of such products, {found.bandwidth / 1e9:,.0f} GB/s, host {1e6 * host:.0f} us a launch"
    )
    return Rates(**{**vars(found), "source": source})


def host_seconds() -> float:
    """Of an operator of a layer so narrow that only the host's work for it counts, the mean of
    forward and backward."""
    shape = {"d_model": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "dropout": 0.1}
    layer = BartEncoderLayer(BartConfig(**shape, attn_implementation="sdpa")).train()
    segments = segments_of(np.array([2, 3]))
    packing = Packing(segments, segments, segments, torch.zeros(5, dtype=torch.long))
    value = torch.zeros(5, 8)

    def run() -> None:
        encoder_layer(layer, value, packing).sum().backward()

    with _Count() as counted:
        run()
    return _fastest(run, 20) / counted.number


class _Count(TorchDispatchMode):
    """Counts operators that launch something; the host's time for views is theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def _seconds_of_products(rows: int, inner: int, outer: int, bf16: bool) -> float:
    """Of a linear layer's product and the two of its backward."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    value, weight, grad = (
        torch.zeros(shape, dtype=dtype) for shape in ((rows, inner), (outer, inner), (rows, outer))
    )

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(value, weight), grad @ weight, grad.T @ value

    return _fastest(run, _TRIES) / torch.get_num_threads()


def _block_bandwidth(rows: int, width: int, bf16: bool) -> float:
    """Of what is between a layer's products: PASSES times what its backward needs, in a second."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    norm, kept = nn.LayerNorm(width), {}
    base = torch.zeros(rows, width, requires_grad=True)
    values = torch.randn(rows, width, dtype=dtype, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def run() -> None:
        mixed = add_dropped(base, F.gelu(values), 0.1, training=True)
        norm(mixed).to(dtype).softmax(1).sum().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return PASSES * sum(kept.values()) * torch.get_num_threads() / _fastest(run, _TRIES)


def _memory_bandwidth() -> float:
    first, second = torch.zeros(2, _LARGE)
    out = torch.empty(_LARGE)
    seconds = _fastest(lambda: torch.add(first, second, out=out), _TRIES)
    return 12 * _LARGE * torch.get_num_threads() / seconds


def _fastest(run: Callable[[], object], tries: int) -> float:
    """Processor seconds of the fastest of some calls, after one that is not timed: what else the
    machine does is not counted."""
    run()
    seconds = []
    for _ in range(tries):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)
