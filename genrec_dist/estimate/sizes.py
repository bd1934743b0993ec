"""What a model is made of, as far as memory and time are concerned: its parameters are counted on
the meta device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from genrec_shards.readers.documents import read_object
from torch import nn

from genrec_dist.config.recipe import Recipe
from genrec_dist.model.build import ModelSizes, make_config
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.model.network import ItemText
from genrec_dist.model.optimizer import build_optimizer
from genrec_dist.text.vectors import vector_width


@dataclass(frozen=True)
class BackboneSizes:
    """The shape of a BART model: width, layers, heads and feed-forward width as in a recipe."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn: int
    positions: int = 1024
    vocabulary: int = 50_265

    @property
    def shape(self) -> dict[str, Any]:
        """The keys of a recipe's `model` section that make a model of this shape."""
        values = dataclasses.asdict(self)
        return {key: values[key] for key in values if key not in ("positions", "vocabulary")}


BACKBONES = {
    "facebook/bart-base": BackboneSizes(768, 6, 6, 12, 3072),
    "facebook/bart-large": BackboneSizes(1024, 12, 12, 16, 4096),
}
"""The backbones of the paper; of others the configuration has to be at hand."""


@dataclass(frozen=True)
class TextSizes:
    """Of the vectors that `model.item_text: add` keeps beside the weights."""

    items: int
    dims: int

    @classmethod
    def of(cls, recipe: Recipe, num_items: int) -> TextSizes | None:
        """Of a recipe's model; None where it keeps none. Raises ValueError as `vector_width`."""
        if recipe.model.item_text != "add":
            return None
        return cls(num_items, vector_width(recipe.model.item_text_source, num_items))


@dataclass(frozen=True)
class ParameterCounts:
    """What a model is made of, as far as memory is concerned."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each dense parameter, by optimiser group, in the optimiser's order."""
    matmul: int
    """Elements of the weights of linear layers, the tied head's included: what autocast casts."""
    id_tables: tuple[int, ...]
    """Rows of each id table."""
    id_dim: int
    """Width of an id row."""
    ids_outside: bool
    """Whether the tables are outside the dense parameters, their rows spread over the ranks
    (row-adagrad)."""
    text: TextSizes | None = None
    """Whose projection is among the parameters."""
    frozen: int = 0
    """Bytes of buffers that no optimiser steps: those of the texts."""

    @property
    def dense(self) -> int:
        """Elements of all dense parameters."""
        return sum(map(sum, self.groups))

    @property
    def ids(self) -> int:
        """Elements of the id tables, whether they are among the dense parameters or not."""
        return sum(self.id_tables) * self.id_dim

    @property
    def parameters(self) -> int:
        return self.dense + (self.ids if self.ids_outside else 0)

    @property
    def largest(self) -> int:
        return max(max(group) for group in self.groups)


def build_config(
    recipe: Recipe, users: int, items: int, vocabulary: int | None = None, spoken: int = 0
) -> GenRecConfig:
    """The model's configuration, without weights or network.

    Args:
        recipe: Its `model` section, or its backbone's shape.
        users: Number of users.
        items: Number of items.
        vocabulary: Number of tokens; None: the backbone's or the recipe's.
        spoken: Tokens of a trimmed vocabulary that share the output's probability.

    Raises:
        ValueError: For a backbone that is neither BART-base, BART-large nor a directory with a BART
            config.json.
    """
    model, positions, tokens = recipe.model, recipe.model.max_tokens, recipe.tokens.vocab_size
    if model.backbone is not None:
        sizes = BACKBONES.get(model.backbone) or _read_sizes(model.backbone)
        positions, tokens = sizes.positions, sizes.vocabulary + recipe.num_masks - 1
        model = dataclasses.replace(model, backbone=None, **sizes.shape)
    config = make_config(
        model,
        ModelSizes(
            vocab_size=vocabulary or tokens,
            num_users=users,
            num_items=items,
            num_masks=recipe.num_masks,
            special={"bos": 0, "pad": 1, "eos": 2, "mask": 4},
            ids_outside=recipe.optimizer.id_tables == "row-adagrad",
        ),
    )
    assert isinstance(config, GenRecConfig)  # of a T5 nothing is foretold
    config.max_position_embeddings = positions
    config.spoken_tokens = spoken
    return config


def _read_sizes(backbone: str) -> BackboneSizes:
    path = Path(backbone) / "config.json"
    if not path.is_file():
        known = ", ".join(BACKBONES)
        raise ValueError(
            f"model.backbone {backbone}: its shape is not known here; give a directory with its "
            f"config.json, or one of {known}"
        )
    values = read_object(path)
    names = {"heads": "encoder_attention_heads", "ffn": "encoder_ffn_dim"}
    names |= {"positions": "max_position_embeddings", "vocabulary": "vocab_size"}
    sizes = {}
    for field in dataclasses.fields(BackboneSizes):
        name = names.get(field.name, field.name)
        if not isinstance(values.get(name), int):
            raise ValueError(f"{path}: {name} is missing: is it the configuration of a BART model?")
        sizes[field.name] = values[name]
    return BackboneSizes(**sizes)


def count_parameters(
    recipe: Recipe, config: GenRecConfig, text: TextSizes | None = None
) -> ParameterCounts:
    """The exact counts, of a model built on the meta device."""
    with torch.device("meta"):
        model = GenRecForConditionalGeneration(config)
        if text is not None:
            sizes = text.items, text.dims, config.vocab_size, config.d_model
            model.item_text = ItemText(*sizes)
    outside = config.ids_outside
    tables = [rows for rows in (config.num_users, config.num_items) if rows]
    groups = build_optimizer(model, recipe.optimizer).param_groups
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    return ParameterCounts(
        groups=tuple(tuple(value.numel() for value in group["params"]) for group in groups),
        matmul=sum(linear),
        id_tables=tuple(rows if outside else rows + 1 for rows in tables),
        id_dim=config.id_dim or config.d_model,
        ids_outside=outside,
        text=text,
        frozen=sum(values.nbytes for values in model.item_text.buffers()) if model.item_text else 0,
    )
