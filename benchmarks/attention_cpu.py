"""Which attention trains faster on a CPU at GenRec's lengths: torch's fused one or plain matrix
products?"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# B samples, H heads, L tokens, D width of a head
B, H, L, D = 100, 4, 40, 32
REPEATS = 7


def fused(query: Tensor, key: Tensor, value: Tensor, seen_B11L: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B11L)


def plain(query: Tensor, key: Tensor, value: Tensor, seen_B11L: Tensor) -> Tensor:
    bias = torch.zeros(seen_B11L.shape, dtype=query.dtype).masked_fill_(~seen_B11L, float("-inf"))
    return torch.softmax(query @ key.transpose(-1, -2) * D**-0.5 + bias, -1) @ value


def seconds(attention: Callable[..., Tensor], inputs: list[Tensor], seen_B11L: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(5):
        attention(*inputs, seen_B11L).sum().backward()
    return (time.perf_counter() - start) / 5


def main() -> None:
    """Forward and backward, the two in turn; prints a JSON table of medians."""
    torch.manual_seed(0)
    seen_B11L = torch.ones(B, 1, 1, L, dtype=torch.bool)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [torch.randn(B, H, L, D, dtype=dtype, requires_grad=True) for _ in range(3)]
        times: dict[str, list[float]] = {"fused": [], "plain": []}
        for turn in range(REPEATS + 1):
            for name, attention in (("fused", fused), ("plain", plain)):
                taken = seconds(attention, inputs, seen_B11L)
                if turn > 0:  # the first turn warms up
                    times[name].append(taken)
        ratios = [a / b for a, b in zip(times["fused"], times["plain"], strict=True)]
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "fused_ms": round(1e3 * statistics.median(times["fused"]), 2),
                "plain_ms": round(1e3 * statistics.median(times["plain"]), 2),
                "fused_over_plain": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    json.dump(
        {
            "name": "attention_cpu",
            "shape": {"B": B, "H": H, "L": L, "D": D},
            "repeats": REPEATS,
            "rows": rows,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "bf16": torch.backends.cpu.get_cpu_capability(),
        },
        sys.stdout,
        indent=1,
    )


if __name__ == "__main__":
    main()
