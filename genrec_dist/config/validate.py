"""The limits of a recipe's values, checked before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from genrec_dist.config.recipe import Recipe


def check_recipe(recipe: Recipe, source: str = "recipe") -> None:
    """Refuse values that no run can have. Raises ValueError naming the key, its value and what it
    may be."""
    for key, (text, holds) in LIMITS.items():
        value = _value_of(recipe, key)
        if not all(holds(one) for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{source}: {key} is {value}: it has to be {text}")
    model = recipe.model
    if model.d_model % model.heads:
        raise ValueError(
            f"{source}: model.d_model {model.d_model} is no multiple of model.heads {model.heads}"
        )
    if recipe.micro_batch_tokens < model.max_tokens:
        raise ValueError(
            f"{source}: micro_batch_tokens {recipe.micro_batch_tokens} is below model.max_tokens {model.max_tokens}: "
            "one sample has to fit"
        )
    if recipe.optimizer.id_tables != "dense" and recipe.optimizer.decay == "all":
        raise ValueError(
            f"{source}: optimizer.decay all: row-adagrad decays no ids; set it to matrices or none"
        )
    _check_attention(recipe, source)
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        together = stage.epochs and stage.targets == "mask" and stage.mask.strategy == "span"
        if together and recipe.tokens.certain == "given":
            raise ValueError(
                f"{source}: {name}.mask.strategy span: an answer of several items has no trie: set tokens.certain learned"
            )
    if recipe.validation.decode != "exact" and not model.item_loss:
        raise ValueError(
            f"{source}: validation.decode {recipe.validation.decode}: there is no item head: set model.item_loss"
        )
    if model.item_loss and not model.item_ids:
        raise ValueError(
            f"{source}: model.item_loss {model.item_loss}: its head shares the item id table: set model.item_ids true"
        )
    if model.item_loss and recipe.optimizer.id_tables != "dense":
        raise ValueError(
            f"{source}: model.item_loss {model.item_loss}: its softmax runs over all items, which row-adagrad does not fetch: set "
            "optimizer.id_tables dense"
        )
    if model.init_items != "random" and recipe.optimizer.id_tables != "dense":
        raise ValueError(
            f"{source}: model.init_items {model.init_items}: tables outside the model begin at random: set optimizer.id_tables "
            "dense"
        )
    if recipe.pretrain.epochs + recipe.finetune.epochs == 0:
        raise ValueError(
            f"{source}: pretrain.epochs and finetune.epochs are both 0: nothing to train"
        )


def _check_attention(recipe: Recipe, source: str) -> None:
    causal = recipe.model.encoder_attention == "causal"
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        if stage.epochs and stage.targets == "all-prefixes" and not causal:
            raise ValueError(
                f"{source}: {name}.targets all-prefixes: set model.encoder_attention causal, or targets every-prefix"
            )
        if stage.epochs and stage.targets == "mask" and causal:
            raise ValueError(
                f"{source}: {name}.targets mask: a causal encoder sees nothing behind a mask: set others, or epochs 0"
            )
    if causal and recipe.model.positions == "from-end":
        raise ValueError(
            f"{source}: model.positions from-end: under causal attention a position would depend on what follows"
        )


def _value_of(recipe: Recipe, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), recipe)


Limit = tuple[str, Callable[[Any], bool]]

# A comparison with NaN is False: these refuse it too.
_POSITIVE: Limit = ("above 0", lambda value: 0 < value < math.inf)

_NOT_NEGATIVE: Limit = ("0 or above", lambda value: 0 <= value < math.inf)

_AT_LEAST_1: Limit = ("1 or above", lambda value: value >= 1)

_SHARE: Limit = ("from 0 to 1", lambda value: 0 <= value <= 1)

_BELOW_1: Limit = ("0 or above and below 1", lambda value: 0 <= value < 1)

_STAGE_LIMITS: dict[str, Limit] = {
    "epochs": _NOT_NEGATIVE,
    "batch_size": _AT_LEAST_1,
    "learning_rate": _POSITIVE,
    "warmup_fraction": _SHARE,
    "label_smoothing": _BELOW_1,
    "mask.p": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "mask.k": _AT_LEAST_1,
}

LIMITS: dict[str, Limit] = {
    "micro_batch_tokens": _AT_LEAST_1,
    "workers": _NOT_NEGATIVE,
    "log_every": _AT_LEAST_1,
    "checkpoint_every": _AT_LEAST_1,
    "keep_checkpoints": _AT_LEAST_1,
    **{
        f"model.{name}": _AT_LEAST_1
        for name in ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn")
    },
    "model.max_tokens": ("16 or above", lambda value: value >= 16),
    **{
        f"model.{name}dropout": _BELOW_1 for name in ("", "attention_", "activation_", "embedding_")
    },
    "model.init_std": _POSITIVE,
    "model.id_dim": _NOT_NEGATIVE,
    "model.item_loss": _NOT_NEGATIVE,
    **{
        f"{stage}.{name}": limit
        for stage in ("pretrain", "finetune")
        for name, limit in _STAGE_LIMITS.items()
    },
    "optimizer.betas": _BELOW_1,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.id_learning_rate": _POSITIVE,
    "optimizer.clip": _NOT_NEGATIVE,
    "optimizer.average": _BELOW_1,
    "validation.users": _NOT_NEGATIVE,
    "validation.beam": _AT_LEAST_1,
    "validation.every_epochs": _AT_LEAST_1,
    "validation.patience": _NOT_NEGATIVE,
}
"""Dotted key -> what it has to be, in words and as a test."""
