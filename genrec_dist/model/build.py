"""An encoder-decoder from a recipe's shape, a backbone's weights or an earlier model's shape."""

# V tokens of a trimmed vocabulary, D width

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import BartConfig, GenerationConfig, PreTrainedConfig, T5Config

from genrec_dist.config.model_config import ModelFileError
from genrec_dist.config.recipe import Model
from genrec_dist.data.word_table import Vocabulary
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.seq2seq.config import GenRecConfig, GenRecT5Config
from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration
from genrec_dist.model.weights import LOGITS_BIAS, is_finite

CodedConfig = GenRecConfig | GenRecT5Config
CodedModel = GenRecForConditionalGeneration | GenRecT5ForConditionalGeneration
"""Of an encoder-decoder over the words of codes."""

CLASSES: dict[str, tuple[type[CodedConfig], type[CodedModel]]] = {
    GenRecConfig.model_type: (GenRecConfig, GenRecForConditionalGeneration),
    GenRecT5Config.model_type: (GenRecT5Config, GenRecT5ForConditionalGeneration),
}
"""By `model_type` of a saved configuration."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """How many rows a model's tables have, and which tokens are special."""

    vocab_size: int
    """Of the tokenizer."""
    num_users: int
    num_items: int
    num_masks: int
    special: dict[str, int]
    """`bos`, `pad`, `eos`, `mask` -> the tokenizer's id."""
    ids_outside: bool = False
    """`GenRecConfig.ids_outside`."""
    vocabulary: Vocabulary | None = None
    """The trimmed one: its tokens alone, in its order. None: all of the tokenizer's."""

    @property
    def num_tokens(self) -> int:
        return self.vocab_size if self.vocabulary is None else self.vocabulary.size

    def special_ids(self) -> dict[str, int]:
        """`special` in the model's numbers."""
        if self.vocabulary is None:
            return self.special
        numbers = self.vocabulary.numbers(np.array(list(self.special.values())))
        return dict(zip(self.special, numbers.tolist(), strict=True))


def build_model(model: Model, sizes: ModelSizes, before: GenRecConfig | None = None) -> CodedModel:
    """A fresh model, or a backbone's weights with fresh id tables where the recipe names one.

    Args:
        model: the recipe's.
        sizes: rows and special tokens.
        before: of an earlier model, whose shape the fresh one has instead of the recipe's.

    Raises:
        ValueError: the backbone cannot be loaded or does not fit; names the ways out.
    """
    if model.backbone is not None and before is None:
        return _from_backbone(model, sizes)
    config = make_config(model, sizes, before)
    check_memory(config)
    return CLASSES[config.model_type][1](config)


def make_config(model: Model, sizes: ModelSizes, before: GenRecConfig | None = None) -> CodedConfig:
    """The configuration of a fresh model; arguments as of `build_model`."""
    settings, kind = _settings(model, sizes), GenRecConfig.model_type
    if before is not None:
        shape, settings["id_dim"] = _shape_of(before), before.id_dim
    elif model.architecture == "t5":
        kind = GenRecT5Config.model_type
        shape = {
            "d_model": model.d_model,
            "d_kv": model.d_model // model.heads,
            "num_heads": model.heads,
            "num_layers": model.encoder_layers,
            "num_decoder_layers": model.decoder_layers,
            "d_ff": model.ffn,
        }
    else:
        shape = {
            "max_position_embeddings": model.max_tokens,
            "d_model": model.d_model,
            "encoder_layers": model.encoder_layers,
            "decoder_layers": model.decoder_layers,
            "encoder_attention_heads": model.heads,
            "decoder_attention_heads": model.heads,
            "encoder_ffn_dim": model.ffn,
            "decoder_ffn_dim": model.ffn,
            "scale_embedding": model.scale_embedding,
            "init_std": model.init_std,
        }
    config = CLASSES[kind][0](**{**shape, **settings, "vocab_size": sizes.num_tokens})
    config.update(_trimmed_settings(sizes.vocabulary))
    return config


def check_memory(config: CodedConfig) -> None:
    """Refuse a model whose float32 weights alone are more than the memory of this machine, before
    any is asked for. Each process holds them whole when they are made. Raises ValueError with both
    sizes."""
    width, outside = config.d_model, config.ids_outside
    ids = 0 if outside else (config.num_users + config.num_items) * (config.id_dim or width)
    weights = (
        (config.vocab_size + 2 * config.max_position_embeddings) * width
        + ids
        # Of a layer: four square matrices per attention, and the feed-forward layer's two.
        + config.encoder_layers * width * (4 * width + 2 * config.encoder_ffn_dim)
        + config.decoder_layers * width * (8 * width + 2 * config.decoder_ffn_dim)
    )
    needed, there = 4 * weights, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"the model has {weights:,} parameters, {needed / 2**30:,.0f} GiB, and this machine "
            f"{there / 2**30:,.0f} GiB of memory: lower model.d_model, model.ffn, the layers, "
            "tokens.vocab_size or model.id_dim"
        )


def _settings(model: Model, sizes: ModelSizes) -> dict[str, Any]:
    """What does not depend on where the shape comes from."""
    special = sizes.special_ids()
    of_backbone: dict[str, Any] = {"dropout_rate": model.dropout, "init_std": model.init_std}
    if model.architecture == "bart":
        of_backbone = {
            "dropout": model.dropout,
            "forced_eos_token_id": None,
            "forced_bos_token_id": None,
        }
    return {
        **of_backbone,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.activation_dropout,
        "num_users": sizes.num_users if model.user_ids else 0,
        "num_items": sizes.num_items if model.item_ids else 0,
        "id_dropout": model.embedding_dropout,
        "id_dim": model.id_dim,
        "ids_outside": sizes.ids_outside,
        "encoder_positions": model.positions,
        "encoder_unit": model.encoder_unit,
        "encoder_attention": model.encoder_attention,
        "decoder_start": model.decoder_start,
        "item_output": model.item_output,
        "item_loss": model.item_loss,
        "num_masks": sizes.num_masks,
        "max_input_tokens": model.max_tokens,
        "bos_token_id": special["bos"],
        "pad_token_id": special["pad"],
        "eos_token_id": special["eos"],
        # The decoder's first input is the mask that it fills (docs/decisions/0004).
        "decoder_start_token_id": special["mask"],
    }


def _shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration's values without those of its origin."""
    of_origin = ("model_type", "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in of_origin}


def _trimmed_settings(vocabulary: Vocabulary | None) -> dict[str, Any]:
    if vocabulary is None:
        return {}
    return {"spoken_tokens": vocabulary.num_outputs, "vocabulary_hash": vocabulary.hash()}


def _from_backbone(model: Model, sizes: ModelSizes) -> CodedModel:
    assert model.backbone is not None
    settings, name = _settings(model, sizes), model.architecture
    their_config, kind = (T5Config, "genrec-t5") if name == "t5" else (BartConfig, "genrec")
    our_config, our_model = CLASSES[kind]
    special = {key: settings[key] for key in settings if key.endswith("_token_id")}
    try:
        theirs = their_config.from_pretrained(model.backbone)
        _check_shape(theirs, model)
        # The backbone's own special tokens are valid until its rows are chosen, or are more.
        trimmed = sizes.vocabulary is not None
        later = {key for key in special if trimmed or (special[key] or 0) >= theirs.vocab_size}
        settings = {key: settings[key] for key in settings if key not in later}
        config = our_config(**{**_shape_of(theirs), **settings})
        network, loading = our_model.from_pretrained(
            model.backbone, config=config, dtype=torch.float32, use_safetensors=True,
            attn_implementation="sdpa", output_loading_info=True,
        )  # fmt: skip
        _check_backbone(model.backbone, network, loading["missing_keys"])
    except (OSError, SafetensorError):
        raise ValueError(
            f"model.backbone {model.backbone}: neither a directory with {name.upper()} weights in "
            "safetensors nor reachable on the hub; download it beforehand and give its directory, "
            "or set model.backbone to null to start from scratch"
        ) from None
    except ModelFileError as error:
        raise ValueError(f"model.backbone {model.backbone}: its config.json: {error}") from None
    except RuntimeError:  # which lists all tensors
        raise ValueError(
            f"model.backbone {model.backbone}: the shapes of its tensors are not those that its "
            "config.json says: download it again"
        ) from None
    if sizes.vocab_size > config.vocab_size:
        network.resize_token_embeddings(sizes.vocab_size)
    network.tie_weights()
    if sizes.vocabulary is None:
        network.config.update(special)  # decoding starts with the mask
    if isinstance(network, GenRecForConditionalGeneration):
        network.final_logits_bias.zero_()  # our head has none, and published weights hold zeros
    if sizes.vocabulary is not None:
        network = _trimmed(network, sizes.vocabulary, special)
    network.generation_config = GenerationConfig.from_model_config(network.config)
    return network


def _check_shape(theirs: Any, model: Model) -> None:
    """Refuse a backbone of another architecture or of a shape that does not fit."""
    name = f"model.backbone {model.backbone}"
    if theirs.model_type != model.architecture:
        known = theirs.model_type in ("bart", "t5")
        way = f"set model.architecture {theirs.model_type}" if known else "only BART and T5 fit"
        raise ValueError(
            f"{name}: it is a {theirs.model_type} model and model.architecture is "
            f"{model.architecture}: {way}"
        )
    if model.architecture == "t5":
        if not theirs.scale_decoder_outputs:
            raise ValueError(
                f"{name}: its head has weights of its own (T5 1.1, FLAN-T5); take a T5 whose head "
                "is its embedding"
            )
    elif theirs.max_position_embeddings < model.max_tokens:
        raise ValueError(
            f"model.max_tokens {model.max_tokens}: {model.backbone} has "
            f"{theirs.max_position_embeddings} positions"
        )


def _check_backbone(name: str, network: CodedModel, missing: Iterable[str]) -> None:
    """Refuse a backbone of which weights are missing or not finite; it has no id tables."""
    fresh = ("user_embedding.", "user_projection.", "item_embedding.", "item_projection.")
    lost = [key for key in missing if not key.startswith(fresh) and key != LOGITS_BIAS]
    if lost:
        raise ValueError(f"model.backbone {name}: tensor {min(lost)} is missing: download it again")
    for key, value in network.named_parameters():
        if not key.startswith(fresh) and not is_finite(value):
            raise ValueError(
                f"model.backbone {name}: tensor {key} holds numbers that are not finite: download "
                "it again"
            )


def _trimmed(
    network: GenRecForConditionalGeneration, vocabulary: Vocabulary, special: dict[str, Any]
) -> GenRecForConditionalGeneration:
    """The same weights with the embedding rows of these tokens alone. `special`: the token ids of
    the configuration, in the vocabulary's numbers."""
    config = copy.deepcopy(network.config)
    config.update({**special, "vocab_size": vocabulary.size, **_trimmed_settings(vocabulary)})
    weights = network.state_dict()
    embedding = weights["model.shared.weight"]
    rows_VD = embedding[torch.from_numpy(vocabulary.tokens)]
    for name, values in weights.items():
        if values.data_ptr() == embedding.data_ptr():  # encoder, decoder and head share it
            weights[name] = rows_VD
    bias_1V = weights["final_logits_bias"].new_zeros(1, vocabulary.size)
    bias_1V[:, vocabulary.num_outputs :] = float("-inf")
    weights["final_logits_bias"] = bias_1V
    with torch.device("meta"):
        trimmed = GenRecForConditionalGeneration(config)
    trimmed.load_state_dict(weights, assign=True)
    trimmed.tie_weights()
    return trimmed.train(network.training)
