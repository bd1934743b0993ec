"""What a device can do at most: published for known cards, measured for a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

CARDS = {
    "RTX 3090": (35.6, 71.0),
    "RTX 4090": (82.6, 165.2),
    "A100": (19.5, 312.0),
    "H100": (66.9, 989.4),
    "H100 PCIe": (51.2, 756.0),
    "H100 NVL": (60.0, 835.0),
    "H200": (66.9, 989.4),
    "H200 NVL": (60.0, 835.0),
}
"""Published dense peaks in TFLOP/s: float32, and bfloat16 with float32 sums."""
MEMORIES = {
    "RTX 3090": 24,
    "RTX 4090": 24,
    "A100": 40,
    "H100": 80,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H200": 141,
    "H200 NVL": 141,
}
"""Published memory in GiB, of which a driver reports a percent less; of several sizes of a card the
smallest."""
BANDWIDTHS = {
    "RTX 3090": 936,
    "RTX 4090": 1008,
    "A100": 1555,
    "H100": 3350,
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H200": 4800,
    "H200 NVL": 4800,
}
"""Published bytes to and from memory in GB/s; of several sizes of a card the slowest."""

_SIDE, _TRIES = 1536, 5
_MOST_SECONDS = 0.05
"""Of one product."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one process's device."""

    flops: float
    source: str
    """In words: published, or what was measured."""


def peak_of(device: torch.device, precision: str) -> Peak | None:
    """The peak of a device; None for a card that is not known here, so that no share of an unknown
    peak is ever stated."""
    if device.type == "cpu":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return _measured(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    found = card_named(torch.cuda.get_device_name(device))
    if found is None:
        return None
    tflops = CARDS[found][precision != "fp32"]
    return Peak(tflops * 1e12, f"published peak of {found}: {tflops:g} TFLOP/s")


def device_name(device: torch.device) -> str:
    """`CPU`, or what a GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def card_named(name: str) -> str | None:
    """The card of `CARDS` that a device's name says, the most exact one; None: none of them."""
    return max((card for card in CARDS if card in name), key=len, default=None)


@cache
def _measured(dtype: torch.dtype, threads: int) -> Peak:
    """The best of a few products of large matrices, by this process's threads: some tenths of a
    second, once a process.

    The matrices are as large as that time allows: a CPU without instructions for bf16 would take a
    minute for those that show what a fast one can do.
    """
    side = 256
    while side < _SIDE and 8 * _seconds_of_product(side, dtype) < _MOST_SECONDS:
        side *= 2
    rate = 2 * side**3 / min(_seconds_of_product(side, dtype) for _ in range(_TRIES))
    kind = str(dtype).removeprefix("torch.")
    source = (
        f"measured: a {kind} product of {side} x {side} matrices, {threads} threads, "
        f"{rate / 1e9:,.0f} GFLOP/s"
    )
    return Peak(rate, source)


def _seconds_of_product(side: int, dtype: torch.dtype) -> float:
    left, right = (torch.zeros(side, side, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    return time.perf_counter() - start
