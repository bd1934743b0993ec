"""What does a loss that never holds all logits cost or spare on a CPU, in time, in memory, and in a
step of `tiny`?

`OMP_NUM_THREADS=1 python benchmarks/head_loss_cpu.py [BEAUTY] [--json FILE]`; BEAUTY: a sharded
data directory."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrec_dist.bench.measure import in_turn, median, table, write_table
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import HeadLoss
from genrec_dist.model.head_loss import head_loss
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup

# Name -> (n label tokens, V vocabulary, D width, whether under autocast to bfloat16)
SHAPES = {
    "tiny": (1024, 16384, 128, True),
    "small": (2048, 4096, 256, True),
    "BART-base": (2048, 50265, 768, True),
    "BART-base, fp32": (2048, 50265, 768, False),
    "BART-base, trimmed": (2048, 1103, 768, True),
}
ROWS = (4096, 8192, 16384)
WAYS: tuple[HeadLoss, ...] = ("full", "chunked")
STEPS = 6


def forward_and_backward(
    rows: int, tokens: int, width: int, bf16: bool, how: HeadLoss
) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(tokens, width) * 0.02).requires_grad_()
    labels = torch.randint(0, tokens, (rows,))

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = head_loss(hidden, weight, labels, 0.0, how)
        (loss / rows).backward()
        return loss.detach()

    return step


def peak_bytes(rows: int, bf16: bool, how: HeadLoss) -> int:
    """What a fresh process's resident memory grows by at most."""
    command = [sys.executable, __file__, "--peak", str(rows), str(int(bf16)), how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(rows: int, bf16: bool, how: HeadLoss) -> None:
    _, tokens, width, _ = SHAPES["BART-base"]
    # Libraries make room of their own at their first product.
    forward_and_backward(64, 512, width, bf16, how)()
    step = forward_and_backward(rows, tokens, width, bf16, how)
    before = most_resident()
    step()
    print(most_resident() - before)


def most_resident() -> int:
    """Bytes. Of this program alone: what `getrusage` tells is also the parent's, from before the
    exec."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def step_seconds(data: str) -> dict[str, list[float]]:
    """Optimiser steps of `tiny` as shipped, the same samples by either way."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("tiny", [f"data={data}", f"run={folder}/run", "workers=0"])
        steps: dict[str, Callable[[], object]] = {}
        for how in WAYS:
            setup, model = build_setup(replace(recipe, head=how))
            loop = Loop(setup, model, make_accelerator(recipe))
            batches = StepBatches(setup.stages, setup.reader, setup.layout, recipe, 0, 1)
            shares = [batches[step] for step in range(STEPS + 1)]
            steps[how] = _stepper(loop, shares)
        return in_turn(steps, STEPS)


def _stepper(loop: Loop, shares: list[Any]) -> Callable[[], object]:
    numbered = iter(enumerate(shares))

    def step() -> object:
        number, share = next(numbered)
        return loop.take_step(number, share, loop.step_totals(share), loop.recipe.finetune, 1.0)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=3)
    options = parser.parse_args()
    if options.peak:
        rows, bf16, how = options.peak
        print_peak(int(rows), bf16 == "1", how)
        return
    found: dict[str, Any] = {"seconds": {}, "peak_mb": {}}
    for name, shape in SHAPES.items():
        seconds = in_turn({how: forward_and_backward(*shape, how) for how in WAYS})
        found["seconds"][name] = {how: median(values) for how, values in seconds.items()}
        print(name, found["seconds"][name], flush=True)
    for bf16 in (True, False):
        for rows in ROWS:
            name = f"{rows} rows, {'bf16' if bf16 else 'fp32'}"
            found["peak_mb"][name] = {how: round(peak_bytes(rows, bf16, how) / 1e6) for how in WAYS}
            print(name, found["peak_mb"][name], flush=True)
    if options.data:
        seconds = step_seconds(options.data)
        found["seconds of a step of tiny"] = {
            how: median(values) for how, values in seconds.items()
        }
        print("a step of tiny", seconds, flush=True)
    if options.json:
        write_table(table("head_loss", [], shapes=SHAPES, **found), options.json)


if __name__ == "__main__":
    main()
