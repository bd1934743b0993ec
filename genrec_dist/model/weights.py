"""Weights of a file, checked against the model that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genrec_dist.config.model_config import REMEDY, ModelFileError

WEIGHTS = "model.safetensors"
LOGITS_BIAS = "final_logits_bias"
"""A buffer of BART that Hugging Face's `generate` adds to logits: -inf where a token is no
output."""


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float32, on the CPU.

    Args:
        path: the file.
        expected: tensors of the model by name, of which only the shapes are read; they may be on
            the meta device.

    Raises:
        ModelFileError: naming the file and the tensor that is missing, foreign, of another shape or
            not finite.
    """
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file: {REMEDY}") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: damaged or incomplete ({error}): {REMEDY}") from None
    check_weights(path, found, expected)
    return {name: value.float() for name, value in found.items()}


def check_weights(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of a file that are not those of a model. Raises ModelFileError as
    `read_weights`."""
    for name, tensor in expected.items():
        if name not in found:
            raise ModelFileError(f"{path}: tensor {name} is missing: {REMEDY}")
        ours, theirs = list(tensor.shape), list(found[name].shape)
        if ours != theirs:
            raise ModelFileError(
                f"{path}: tensor {name} has the shape {theirs}, the model {ours}: {REMEDY}"
            )
    for name, value in found.items():
        if name not in expected:
            raise ModelFileError(f"{path}: tensor {name} is none of the model's: {REMEDY}")
        if not is_finite(value, may_be_low=name == LOGITS_BIAS):
            raise ModelFileError(
                f"{path}: tensor {name} holds numbers that are not finite: {REMEDY}"
            )


def is_finite(value: Tensor, may_be_low: bool = False) -> bool:
    """Whether all numbers are finite; `may_be_low`: or -inf."""
    # A sum is finite only if all its terms are, and reads memory at its full speed; that of large
    # finite values can overflow, so then each value is looked at.
    if torch.isfinite(value.sum()):
        return True
    finite = torch.isfinite(value)
    if may_be_low:
        finite |= value == float("-inf")
    return bool(finite.all())
