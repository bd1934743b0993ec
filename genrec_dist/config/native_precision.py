"""What `precision: auto` means on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe


def native_precision() -> Literal["bf16", "fp32"]:
    """bf16 on a GPU and on a CPU with instructions for it (AMX, AVX-512 BF16), fp32 elsewhere.

    A CPU without them computes a bf16 product many times slower than an fp32 one (docs/log.md,
    2026-11-29: 16 times).
    """
    import torch

    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if torch.cuda.is_available() or has_bf16 else "fp32"


def slow_precision(recipe: Recipe) -> str:
    """A line about a precision that this machine can compute but is slow at; "" where it is
    not."""
    if recipe.precision != "bf16" or native_precision() == "bf16":
        return ""
    return (
        "precision bf16: this processor has no instructions for it, so each step takes many times "
        "as long as in fp32; a new run with precision: auto takes what the machine has"
    )


def with_precision(recipe: Recipe, run: Path | None = None) -> Recipe:
    """The recipe with `precision: auto` replaced by fp32 or bf16.

    Args:
        recipe: of a run.
        run: the directory of the run that is resumed. It keeps the precision it began with, on
            whatever machine it goes on.
    """
    if recipe.precision != "auto":
        return recipe
    if run is not None and (run / "recipe.yaml").is_file():
        kept = load_recipe(run / "recipe.yaml").precision
        if kept != "auto":
            return dataclasses.replace(recipe, precision=kept)
    return dataclasses.replace(recipe, precision=native_precision())
