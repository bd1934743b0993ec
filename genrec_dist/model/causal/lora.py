"""Low-rank adapters of a prompted model, by peft: what is trained in place of all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrec_dist.config.recipe import Lora
from genrec_dist.distributed.launch_check import name_device_to_deepspeed

ADAPTER_FOLDER = "adapter"
"""Of a model's own adapters, beside the merged weights."""


def add_adapters(lm: Any, lora: Lora) -> Any:
    """Put adapters into a language model, in place, and freeze its other weights.

    Args:
        lm: of transformers.
        lora: with a rank above 0.

    Returns:
        peft's model around it.

    Raises:
        ValueError: peft is not installed, or no module has such a name.
    """
    if find_spec("peft") is None:
        raise ValueError(
            "lora.rank: peft is not installed: pip install 'genrec-dist[llama]', or set it to 0"
        )
    name_device_to_deepspeed()  # which peft imports
    from peft import LoraConfig, get_peft_model

    whole = lora.targets == "all-linear"
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if whole else [n.strip() for n in lora.targets.split(",")],
    )
    try:
        return get_peft_model(lm, settings)
    except ValueError as error:
        raise ValueError(f"lora.targets {lora.targets}: {' '.join(str(error).split())}") from None


def save_adapters(peft_model: Any, folder: Path) -> None:
    """Write `adapter/` in peft's own form, safetensors, without its model card."""
    peft_model.save_pretrained(str(folder / ADAPTER_FOLDER), safe_serialization=True)
    (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)


@torch.no_grad()
def merged_weights(lm: Any) -> dict[str, Tensor]:
    """The language model's weights with its adapters added, under the names that it has without;
    the model itself stays as it is, to the bit."""
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in lm.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in lm.named_modules():
        if hasattr(module, "base_layer"):
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter)
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    return weights


def hash_of_frozen(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (hex) of the weights that are not trained: they are in no checkpoint."""
    digest = hashlib.sha256(b"genrec frozen weights 1\n")
    for name, parameter in named:
        if not parameter.requires_grad:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
