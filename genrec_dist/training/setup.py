"""Everything a run is made of before its first step: data, tokenizer, words, plans and a fresh
model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.keyed_random import mixed_key
from genrec_shards.numbering.cooccurrence import neighbour_vectors
from genrec_shards.storage.reader import ShardReader

from genrec_dist.config.recipe import MOVES_NO_GRADIENT, Recipe
from genrec_dist.data.encoder_input import Layout
from genrec_dist.data.tokenizer import grow_tokenizer, load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import WordTable, build_words, mask_tokens, trim
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.load import make_layout
from genrec_dist.model.build import begin_items_with, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.head_loss import target_loss
from genrec_dist.model.item_init import MOST_FACTORS
from genrec_dist.training.checkpoint import FRESH
from genrec_dist.training.id_tables import IdTables
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.stages import StageSteps, plan_stages
from genrec_dist.training.warm_start import Begun, Origin, begin_model, check_origin, open_origin


@dataclass(frozen=True)
class Workshop:
    """Everything a run is made of, before its first step."""

    recipe: Recipe
    run: Path
    dataset: Dataset
    reader: ShardReader
    tokenizer: Any
    words: WordTable
    layout: Layout
    stages: list[StageSteps]
    identity: dict[str, str]
    begun: Begun | None = None
    """Of a run that begins with another's weights."""


def open_workshop(recipe: Recipe) -> tuple[Workshop, GenRecForConditionalGeneration]:
    """Data, tokenizer, words, plans and a model with fresh weights (a function of the seed), or
    with those it begins from."""
    dataset = load_dataset(recipe.data)
    # One process a node reads every byte to check it; the others trust what it found.
    reader = ShardReader(recipe.shards_dir, verify=os.environ.get("LOCAL_RANK", "0") == "0")
    if reader.manifest.sequences_hash != dataset.sequences.sequences_hash():
        raise ValueError(
            f"{recipe.shards_dir}: made from other sequences than {recipe.data}: run `genrec shard` again"
        )
    origin = None if recipe.begin_from is None else open_origin(recipe.begin_from)
    if origin is not None:
        check_origin(origin, recipe, dataset)
    tokenizer = _tokenizer(recipe, dataset, origin)
    codes = dataset.numbering
    num_masks = recipe.num_masks if origin is None else origin.config.num_masks
    words = build_words(tokenizer, codes.item_codes, codes.user_codes, num_masks)
    # A tokenizer can have holes in its ids.
    vocab_size = max(len(tokenizer), int(words.tokens.max()) + 1)
    special = {
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "mask": mask_tokens(tokenizer, 1)[0],
    }
    if recipe.tokens.trim:
        words = trim(words, tokenizer.pad_token_id)
    torch.manual_seed(mixed_key(recipe.seed, 0x1217) >> 1)
    begun = None
    if origin is None:
        model = _fresh_model(recipe, dataset, words, vocab_size, special)
    else:
        model, begun = begin_model(origin, recipe, dataset, words, vocab_size, special)
    model.config.numbering_hash = codes.numbering_hash()
    model.config.split = dataset.info.split_name
    model.config.certain_tokens = recipe.tokens.certain
    layout = make_layout(words, model.config)
    identity = {
        "sequences": dataset.sequences.sequences_hash(),
        "numbering": codes.numbering_hash(),
        "recipe": _recipe_hash(recipe),
        "vocabulary": "whole" if words.vocabulary is None else words.vocabulary.hash(),
        "origin": FRESH if origin is None else origin.weights_hash,
    }
    stages = plan_stages(recipe, reader)
    return Workshop(
        recipe, Path(recipe.run), dataset, reader, tokenizer, words, layout, stages, identity, begun
    ), model


def _fresh_model(
    recipe: Recipe, dataset: Dataset, words: WordTable, vocab_size: int, special: dict[str, int]
) -> GenRecForConditionalGeneration:
    model = build_model(
        recipe.model,
        vocab_size=vocab_size,
        num_users=words.num_users,
        num_items=words.num_items,
        num_masks=recipe.num_masks,
        special=special,
        ids_outside=recipe.optimizer.id_tables != "dense",
        vocabulary=words.vocabulary,
    )
    if recipe.model.init_items == "cooccurrence":
        vectors_NF = neighbour_vectors(
            dataset.sequences, min(recipe.model.d_model, MOST_FACTORS), recipe.seed
        )
        begin_items_with(model, vectors_NF, words)
    return model


def _tokenizer(recipe: Recipe, dataset: Dataset, origin: Origin | None) -> Any:
    if origin is not None:
        known = len(origin.best.catalogue.item_codes)
        codes = dataset.numbering.item_codes
        return grow_tokenizer(origin.best.tokenizer, codes[:known], codes[known:])
    name = recipe.tokens.tokenizer or recipe.model.backbone
    if name is None:
        return train_tokenizer(
            dataset.numbering.item_codes, recipe.tokens.vocab_size, recipe.num_masks
        )
    return load_tokenizer(name, recipe.num_masks)


def _recipe_hash(recipe: Recipe) -> str:
    """What must not change between a checkpoint and its resume; paths, the cut into micro-batches
    and the loss's way may."""
    values = recipe.as_dict()
    # Of what a run begins from the weights count, which have a hash of their own.
    for key in (*MOVES_NO_GRADIENT, "begin_from", "head", "packing", "recompute"):
        del values[key]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a run would do (`--dry-run`): sizes and steps, one batch through the model, nothing
    written."""
    workshop, model = open_workshop(recipe)
    outside = model.config if model.config.ids_outside else None
    share = StepBatches(workshop.stages, workshop.reader, workshop.layout, recipe, 0, 1, outside)[0]
    tables = IdTables(model.config, recipe.seed, Ranks(), model.device)
    if workshop.begun is not None:
        tables.begin_with(workshop.begun.id_rows)
    tables.attach(model, share)
    batches = share.micro_batches
    with torch.inference_mode():
        first = batches[-1]
        logits, labels = model.target_logits(
            first.encoder, first.encoder_row, first.decoder_input_ids, first.labels, first.visible,
            None if first.asked is None else first.asked.places_R,
        )  # fmt: skip
        loss = float(target_loss(logits, labels, first.num_target_tokens))
    return {
        "users": workshop.words.num_users,
        "items": workshop.words.num_items,
        "parameters": sum(p.numel() for p in model.parameters()) + tables.num_parameters,
        "vocabulary": model.config.vocab_size,
        "tokens an item": float(np.diff(workshop.words.tokens_of_items()[1]).mean()),
        "first loss": loss,
        "stages": {
            s.name: {
                "samples": s.plan.num_samples,
                "users without a sample": s.plan.users_without_samples,
                "steps an epoch": s.plan.steps_per_epoch,
                "epochs": s.stage.epochs,
                "first batch": list(batches[-1].encoder.input_ids.shape),
            }
            for s in workshop.stages
        },
    }
