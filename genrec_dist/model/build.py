"""A model made: fresh from a recipe's shape, from BART's weights, with the rows of a trimmed
vocabulary alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import BartConfig, GenerationConfig

from genrec_dist.config.recipe import Model
from genrec_dist.data.word_table import Vocabulary, WordTable
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration, IdEmbedding
from genrec_dist.model.item_init import turn_rows

_NOT_SHAPE = ("model_type", "architectures", "transformers_version")
"""What a configuration's dictionary holds of its origin."""


def make_config(
    model: Model,
    *,
    vocab_size: int,
    num_users: int,
    num_items: int,
    num_masks: int,
    special: dict[str, int],
    ids_outside: bool = False,
) -> GenRecConfig:
    """Configuration of a model from scratch. `special`: bos, pad, eos and mask token ids;
    `ids_outside`: see GenRecConfig."""
    return GenRecConfig(
        vocab_size=vocab_size,
        max_position_embeddings=model.max_tokens,
        d_model=model.d_model,
        encoder_layers=model.encoder_layers,
        decoder_layers=model.decoder_layers,
        encoder_attention_heads=model.heads,
        decoder_attention_heads=model.heads,
        encoder_ffn_dim=model.ffn,
        decoder_ffn_dim=model.ffn,
        scale_embedding=model.scale_embedding,
        init_std=model.init_std,
        **_common(model, num_users, num_items, num_masks, special, ids_outside),
    )


def _common(
    model: Model,
    num_users: int,
    num_items: int,
    num_masks: int,
    special: dict[str, int],
    ids_outside: bool,
) -> dict[str, Any]:
    return {
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.activation_dropout,
        "num_users": num_users if model.user_ids else 0,
        "num_items": num_items if model.item_ids else 0,
        "id_dropout": model.embedding_dropout,
        "id_dim": model.id_dim,
        "ids_outside": ids_outside,
        "encoder_positions": model.positions,
        "encoder_unit": model.encoder_unit,
        "encoder_attention": model.encoder_attention,
        "decoder_start": model.decoder_start,
        "item_loss": model.item_loss,
        "num_masks": num_masks,
        "max_input_tokens": model.max_tokens,
        "bos_token_id": special["bos"],
        "pad_token_id": special["pad"],
        "eos_token_id": special["eos"],
        # The decoder is told which mask it fills (docs/decisions/0004).
        "decoder_start_token_id": special["mask"],
        "forced_eos_token_id": None,
        "forced_bos_token_id": None,
    }


def build_model(
    model: Model,
    *,
    vocab_size: int,
    num_users: int,
    num_items: int,
    num_masks: int,
    special: dict[str, int],
    ids_outside: bool = False,
    vocabulary: Vocabulary | None = None,
) -> GenRecForConditionalGeneration:
    """A fresh model, or BART's weights with fresh id tables where the recipe names a backbone.

    `vocab_size`, `special`: in ids of the tokenizer. `vocabulary`: keep its tokens alone, in its
    order.

    Raises ValueError naming the backbone and the ways out if it cannot be loaded or does not fit.
    """
    if vocabulary is not None:
        special = dict(
            zip(special, vocabulary.numbers(np.array(list(special.values()))).tolist(), strict=True)
        )
    if model.backbone is None:
        config = make_config(
            model,
            vocab_size=vocab_size if vocabulary is None else vocabulary.size,
            num_users=num_users,
            num_items=num_items,
            num_masks=num_masks,
            special=special,
            ids_outside=ids_outside,
        )
        if vocabulary is not None:
            config.spoken_tokens, config.vocabulary_hash = vocabulary.num_outputs, vocabulary.hash()
        return GenRecForConditionalGeneration(config)
    common = _common(model, num_users, num_items, num_masks, special, ids_outside)
    return _from_backbone(model, vocab_size, common, vocabulary)


def like_before(
    before: GenRecConfig,
    model: Model,
    *,
    vocab_size: int,
    num_users: int,
    num_items: int,
    num_masks: int,
    special: dict[str, int],
    ids_outside: bool,
    vocabulary: Vocabulary | None,
) -> GenRecForConditionalGeneration:
    """A fresh model of an earlier one's shape, with rows for so many tokens, users and items;
    arguments as of `build_model`."""
    if vocabulary is not None:
        special = dict(
            zip(special, vocabulary.numbers(np.array(list(special.values()))).tolist(), strict=True)
        )
    shape = {key: value for key, value in before.to_dict().items() if key not in _NOT_SHAPE}
    common = _common(model, num_users, num_items, num_masks, special, ids_outside)
    size = vocab_size if vocabulary is None else vocabulary.size
    config = GenRecConfig(**{**shape, **common, "id_dim": before.id_dim, "vocab_size": size})
    if vocabulary is not None:
        config.spoken_tokens, config.vocabulary_hash = vocabulary.num_outputs, vocabulary.hash()
    return GenRecForConditionalGeneration(config)


def init_item_rows(
    network: GenRecForConditionalGeneration, vectors_NF: np.ndarray, words: WordTable
) -> None:
    """`turn_rows` of the items' tokens where each item is one token, else of the item id table;
    vectors float [N, F].

    Raises ValueError where several tokens make an item and there is no item id table.
    """
    tokens, offsets = words.tokens_of_items()
    if (np.diff(offsets) == 1).all():
        rows_N, table = torch.from_numpy(tokens.astype(np.int64)), network.model.shared.weight
    elif isinstance(network.item_embedding, IdEmbedding):
        rows_N, table = torch.arange(1, words.num_items + 1), network.item_embedding.weight
    else:
        raise ValueError(
            "model.init_items: items have several tokens and no id: set model.item_ids true or raise tokens.vocab_size"
        )
    turn_rows(table, rows_N, vectors_NF, network.config.init_std)


def _from_backbone(
    model: Model, vocab_size: int, common: dict[str, Any], vocabulary: Vocabulary | None
) -> GenRecForConditionalGeneration:
    assert model.backbone is not None
    special = {key: value for key, value in common.items() if key.endswith("_token_id")}
    try:
        # Until the rows are picked, the backbone's own special tokens hold.
        ours = (
            common
            if vocabulary is None
            else {key: common[key] for key in common.keys() - special.keys()}
        )
        config = _backbone_config(model, ours)
        network = GenRecForConditionalGeneration.from_pretrained(
            model.backbone, config=config, dtype=torch.float32
        )
    except (OSError, SafetensorError):
        raise ValueError(
            f"model.backbone {model.backbone}: neither a directory with BART weights nor reachable on the hub; "
            "download it beforehand and give its directory, or set model.backbone to null to start from scratch"
        ) from None
    if vocab_size > config.vocab_size:
        network.resize_token_embeddings(vocab_size)
    network.tie_weights()
    # Our head has no bias (published BART weights hold zeros), and decoding starts with the mask.
    network.final_logits_bias.zero_()
    if vocabulary is not None:
        network = _trimmed(network, vocabulary, special)
    network.generation_config = GenerationConfig.from_model_config(network.config)
    return network


def _trimmed(
    network: GenRecForConditionalGeneration, vocabulary: Vocabulary, special: dict[str, Any]
) -> GenRecForConditionalGeneration:
    """The same weights with the embedding's rows of these tokens alone. `special`: the
    configuration's ids, in its numbers."""
    config = copy.deepcopy(network.config)
    kept = {
        "vocab_size": vocabulary.size,
        "spoken_tokens": vocabulary.num_outputs,
        "vocabulary_hash": vocabulary.hash(),
    }
    config.update({**special, **kept})
    weights = network.state_dict()
    embedding_VD = weights["model.shared.weight"]
    rows_VD = embedding_VD[torch.from_numpy(vocabulary.tokens)]
    for name, values in weights.items():
        if values.data_ptr() == embedding_VD.data_ptr():  # encoder, decoder and head share it
            weights[name] = rows_VD
    bias_1V = weights["final_logits_bias"].new_zeros(1, vocabulary.size)
    bias_1V[:, vocabulary.num_outputs :] = float("-inf")
    weights["final_logits_bias"] = bias_1V
    with torch.device("meta"):
        trimmed = GenRecForConditionalGeneration(config)
    trimmed.load_state_dict(weights, assign=True)
    trimmed.tie_weights()
    return trimmed.train(network.training)


def _backbone_config(model: Model, common: dict[str, Any]) -> GenRecConfig:
    bart = BartConfig.from_pretrained(model.backbone)
    if bart.model_type != "bart":
        raise ValueError(
            f"model.backbone {model.backbone}: it is a {bart.model_type} model, only BART fits"
        )
    if bart.max_position_embeddings < model.max_tokens:
        raise ValueError(
            f"model.max_tokens {model.max_tokens}: {model.backbone} has {bart.max_position_embeddings} positions"
        )
    shape = {key: value for key, value in bart.to_dict().items() if key not in _NOT_SHAPE}
    return GenRecConfig(**{**shape, **common})
