"""Everything a run is made of before its first step: data, tokenizer, words, plans and a fresh model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.cooccurrence import neighbour_vectors
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.keyed import mixed_key
from genrec_shards.plan import Plan, Space, split_among_ranks
from genrec_shards.read import ShardReader
from torch.utils.data import Dataset as TorchDataset

from genrec_dist.batch import RankStep, make_step
from genrec_dist.begin import MOST_FACTORS
from genrec_dist.build import begin_items_with, build_model
from genrec_dist.checkpoint import FRESH
from genrec_dist.loss import target_loss
from genrec_dist.model import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.ranks import Ranks
from genrec_dist.recipe import MOVES_NO_GRADIENT, Recipe, Stage
from genrec_dist.refresh import Begun, Origin, begin_model, check_origin, open_origin
from genrec_dist.run import make_layout
from genrec_dist.sums import plan_sums
from genrec_dist.tables import IdTables, plan_ids
from genrec_dist.text import Layout
from genrec_dist.tokens import (
    WordTable,
    build_words,
    grow_tokenizer,
    load_tokenizer,
    mask_tokens,
    train_tokenizer,
    trim,
)


@dataclass(frozen=True)
class StageSteps:
    """A stage's place in the run's line of global steps."""

    name: str
    stage: Stage
    plan: Plan
    first_step: int
    first_epoch: int

    @property
    def num_steps(self) -> int:
        return self.plan.steps_per_epoch * self.stage.epochs

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch of the stage, step of the epoch) of a global step."""
        return divmod(step - self.first_step, self.plan.steps_per_epoch)

    def ends_epoch(self, step: int) -> bool:
        return self.locate(step)[1] == self.plan.steps_per_epoch - 1


class StepBatches(TorchDataset[RankStep]):
    """Global step -> this rank's share of it. A map, so that loading ahead and resuming need no state."""

    def __init__(
        self,
        stages: list[StageSteps],
        reader: ShardReader,
        layout: Layout,
        recipe: Recipe,
        rank: int,
        world: int,
        ids_outside: GenRecConfig | None = None,
        sums: GenRecConfig | None = None,
        packed: bool = False,
    ):
        """`ids_outside`, `sums`: the model's configuration where its id tables live outside it, where its sum takes plans."""
        self.stages, self.reader, self.layout, self.recipe = stages, reader, layout, recipe
        self.rank, self.world, self.ids_outside, self.sums, self.packed = rank, world, ids_outside, sums, packed

    def __getitem__(self, step: int) -> RankStep:
        here = stage_of(self.stages, step)
        epoch, step_of_epoch = here.locate(step)
        samples = split_among_ranks(here.plan.step(here.first_epoch + epoch, step_of_epoch), self.rank, self.world)
        share = make_step(
            samples,
            self.reader,
            self.layout,
            mask=here.stage.mask if here.stage.targets == "mask" else None,
            seed=self.recipe.seed,
            epoch=here.first_epoch + epoch,
            micro_batch_tokens=self.recipe.micro_batch_tokens,
            packed=self.packed,
            all_prefixes=here.stage.targets == "all-prefixes",
            ask_items=self.recipe.model.item_loss > 0 or self.recipe.model.decoder_start == "state",
        )
        if self.ids_outside is not None:
            share = plan_ids(share, self.ids_outside)
        return share if self.sums is None else plan_sums(share, self.sums)


def stage_of(stages: list[StageSteps], step: int) -> StageSteps:
    return next(stage for stage in stages if step < stage.end_step)


def plan_stages(recipe: Recipe, reader: ShardReader) -> list[StageSteps]:
    """The stages that have epochs, one behind the other. Epochs are numbered through, so no two stages share an order."""
    stages: list[StageSteps] = []
    first_step = first_epoch = 0
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        if stage.epochs == 0:
            continue
        space: Space = "user" if stage.targets in ("mask", "all-prefixes") else stage.targets  # type: ignore[assignment]
        plan = Plan(
            reader.lengths,
            reader.manifest.users_per_record,
            space=space,
            batch_size=stage.batch_size,
            seed=recipe.seed,
            trained_through=recipe.trained_through,
            periods=reader.periods,
        )
        if plan.num_samples == 0:
            raise ValueError(f"{name}: no user has a sample for targets {stage.targets!r}")
        stages.append(StageSteps(name, stage, plan, first_step, first_epoch))
        first_step, first_epoch = stages[-1].end_step, first_epoch + stage.epochs
    return stages


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
    """Data, tokenizer, words, plans and a model with fresh weights (a function of the seed), or with those it begins from."""
    dataset = load_dataset(recipe.data)
    # One process a node reads every byte to check it; the others trust what it found.
    reader = ShardReader(recipe.shards_dir, verify=os.environ.get("LOCAL_RANK", "0") == "0")
    if reader.manifest.sequences_hash != dataset.sequences.sequences_hash():
        raise ValueError(f"{recipe.shards_dir}: made from other sequences than {recipe.data}: run `genrec shard` again")
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
    model.config.split = dataset.info.split_told
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
    return Workshop(recipe, Path(recipe.run), dataset, reader, tokenizer, words, layout, stages, identity, begun), model


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
        vectors_NF = neighbour_vectors(dataset.sequences, min(recipe.model.d_model, MOST_FACTORS), recipe.seed)
        begin_items_with(model, vectors_NF, words)
    return model


def _tokenizer(recipe: Recipe, dataset: Dataset, origin: Origin | None) -> Any:
    if origin is not None:
        known = len(origin.best.catalogue.item_codes)
        codes = dataset.numbering.item_codes
        return grow_tokenizer(origin.best.tokenizer, codes[:known], codes[known:])
    name = recipe.tokens.tokenizer or recipe.model.backbone
    if name is None:
        return train_tokenizer(dataset.numbering.item_codes, recipe.tokens.vocab_size, recipe.num_masks)
    return load_tokenizer(name, recipe.num_masks)


def _recipe_hash(recipe: Recipe) -> str:
    """What must not change between a checkpoint and its resume; paths, the cut into micro-batches and the loss's way may."""
    values = recipe.as_dict()
    # Of what a run begins from the weights count, which have a hash of their own.
    for key in (*MOVES_NO_GRADIENT, "begin_from", "head", "packing", "recompute"):
        del values[key]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a run would do (`--dry-run`): sizes and steps, one batch through the model, nothing written."""
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
