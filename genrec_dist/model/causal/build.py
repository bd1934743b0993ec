"""A prompted model from a recipe: a causal language model's weights, or fresh ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from genrec_dist.config.model_config import REMEDY, ModelFileError
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.layout import PromptLayout
from genrec_dist.model.causal.attention import NAME
from genrec_dist.model.causal.config import PromptedConfig, load_prompted_config
from genrec_dist.model.causal.prompted import PromptedModel
from genrec_dist.model.weights import WEIGHTS, is_finite


def build_prompted(
    recipe: Recipe, layout: PromptLayout, eos_token: int, vocab_size: int
) -> PromptedModel:
    """The model of a recipe with a prompt.

    Args:
        recipe: with the backbone's name, or the shape of a fresh one.
        layout: of its prompts.
        eos_token: ends an answer.
        vocab_size: of the tokenizer.

    Raises:
        ValueError: the backbone cannot be loaded or does not fit; names the ways out.
    """
    model = recipe.model
    longest = layout.max_tokens + len(layout.lead) + 1 + layout.words.longest_item
    if model.backbone is None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.ffn,
            num_hidden_layers=model.decoder_layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.heads,
            max_position_embeddings=longest,
            initializer_range=model.init_std,
            attention_dropout=model.attention_dropout,
            tie_word_embeddings=True,
            eos_token_id=eos_token,
            bos_token_id=None,
            pad_token_id=layout.pad_token,
        )
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)
    else:
        lm = _load(model.backbone, model.attention_dropout)
        name, room = f"model.backbone {model.backbone}", lm.config.max_position_embeddings
        if longest > room:
            raise ValueError(
                f"model.max_tokens {model.max_tokens}: with the longest answer {longest} positions "
                f"and {name} has {room}: lower it"
            )
        if vocab_size > lm.config.vocab_size:
            raise ValueError(
                f"{name}: {lm.config.vocab_size} tokens, the tokenizer has {vocab_size}: set "
                "tokens.tokenizer to the model's own"
            )
    return PromptedModel(
        lm,
        PromptedConfig(
            template=recipe.prompt.template,
            separator=recipe.prompt.separator,
            max_titles=recipe.prompt.max_titles,
            max_input_tokens=model.max_tokens,
            tail_tokens=layout.tail.tolist(),
            eos_token_id=eos_token,
            pad_token_id=layout.pad_token,
        ),
        recipe.lora,
    )


def _load(name: str, attention_dropout: float) -> Any:
    """A causal language model of transformers, from safetensors alone."""
    try:
        config = AutoConfig.from_pretrained(name)
        kinds = getattr(config, "layer_types", None) or []
        windowed = getattr(config, "sliding_window", None) and "full_attention" not in set(kinds)
        if config.is_encoder_decoder or windowed or any(k != "full_attention" for k in kinds):
            raise ValueError(
                f"model.backbone {name}: a {config.model_type} model; one whose layers are "
                "decoders that attend to all earlier tokens fits, such as Llama"
            )
        if quantised := getattr(config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"model.backbone {name}: its weights are quantised ({method}); those in float32, "
                "float16 or bfloat16 are read: give the model that it was made of"
            )
        config.attention_dropout = attention_dropout
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            attn_implementation=NAME,
            dtype=torch.float32,
            use_safetensors=True,
        )
    except (OSError, SafetensorError):
        raise ValueError(
            f"model.backbone {name}: neither a directory with config.json and model.safetensors "
            "nor reachable on the hub; download it beforehand and give its directory, or set "
            "model.backbone to null for fresh weights"
        ) from None


def load_prompted(folder: Path) -> PromptedModel:
    """What `PromptedModel.save_pretrained` wrote. Raises ModelFileError naming the file, and the
    tensor that is missing or not finite."""
    config = load_prompted_config(folder)
    lm, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=NAME,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills them with random numbers and warns.
    lost = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    lost += [name for name, value in lm.named_parameters() if not is_finite(value)]
    if lost:
        raise ModelFileError(
            f"{folder / WEIGHTS}: tensor {lost[0]} is missing, misshapen or not finite: {REMEDY}"
        )
    return PromptedModel(lm, config)
