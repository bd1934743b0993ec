"""What a run needs before its first step: data, tokenizer, words, plans and a model."""

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
from genrec_shards.histories import exclude_history_default, training_counts
from genrec_shards.keyed_random import mixed_key
from genrec_shards.numbering.cooccurrence import neighbour_vectors
from genrec_shards.storage.reader import ShardReader
from transformers import PreTrainedTokenizerFast

from genrec_dist.baselines.soft_targets import soft_targets_of
from genrec_dist.config.load import RENAMED_KEYS, with_old_keys
from genrec_dist.config.recipe import MOVES_NO_GRADIENT, Recipe
from genrec_dist.config.used_settings import flat
from genrec_dist.data.layout import Layout
from genrec_dist.data.prompt.title_words import (
    build_title_words,
    make_prompt_layout,
    titles_of,
    train_title_tokenizer,
)
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.data.tokenizer import grow_tokenizer, load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import WordTable, build_words, mask_tokens, trim
from genrec_dist.decoding.output_head import siblings_of
from genrec_dist.decoding.trie import build_trie, hash_of_words
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.load import forced_of, make_layout
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.causal.build import build_prompted
from genrec_dist.model.causal.kinds import AnyModel, loss_of_targets
from genrec_dist.model.causal.lora import hash_of_frozen
from genrec_dist.model.item_rows import (
    MOST_FACTORS,
    add_texts,
    begin_with_texts,
    init_item_rows,
    item_tokens,
    texts_in_table,
)
from genrec_dist.text.vectors import check_source, item_vectors
from genrec_dist.training.id_tables import IdTables, with_ids_outside
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.stages import StageSteps, plan_stages
from genrec_dist.training.step.micro_batches import Devices, settle_micro_batches
from genrec_dist.training.warm_start import WarmStart, check_origin, open_origin, warm_start_model

FRESH = "fresh"
"""Origin of a run that starts from fresh weights."""


@dataclass(frozen=True)
class TrainingSetup:
    """What a run needs before its first step, beside the model."""

    recipe: Recipe
    run: Path
    dataset: Dataset
    reader: ShardReader
    tokenizer: PreTrainedTokenizerFast
    words: WordTable
    layout: Layout
    stages: list[StageSteps]
    identity: dict[str, str]
    """Hashes that a resumed run must have too (`checkpoint.State.identity`)."""
    warm_start: WarmStart | None = None
    """Of a run that starts from another's weights."""
    teacher: Teacher | None = None
    """Where soft targets have a weight."""


def build_setup(recipe: Recipe, soft_targets: bool = True) -> tuple[TrainingSetup, AnyModel]:
    """Everything that training by a recipe needs, and its model.

    Args:
        recipe: of the run.
        soft_targets: whether to make those of the recipe; a dry run takes none.

    Returns:
        The setup, and a model with fresh weights (a function of the seed) or with those of
        `init_from`.

    Raises:
        ValueError: where data, shards, recipe and origin do not fit together.
    """
    if recipe.decode == "hybrid":
        check_source(recipe.text)
    dataset = load_dataset(recipe.data)
    # One process per node reads every byte to check it; the others rely on its result.
    reader = ShardReader(recipe.shards_dir, verify=os.environ.get("LOCAL_RANK", "0") == "0")
    reader.expect(dataset.sequences, recipe.data)
    if recipe.prompt.template:
        parts = _prompted_parts(recipe, dataset)
    else:
        parts = _coded_parts(recipe, dataset, soft_targets)
    model, words = parts.model, parts.layout.words
    model.config.numbering_hash = dataset.numbering.numbering_hash()
    model.config.split = dataset.info.split_name
    setup = TrainingSetup(
        recipe=recipe,
        run=Path(recipe.run),
        dataset=dataset,
        reader=reader,
        tokenizer=parts.tokenizer,
        words=words,
        layout=parts.layout,
        stages=plan_stages(recipe, reader),
        identity={
            "sequences": reader.manifest.sequences_hash,
            "numbering": dataset.numbering.numbering_hash(),
            "recipe": _recipe_hash(recipe),
            "vocabulary": "whole" if words.vocabulary is None else words.vocabulary.hash(),
            **parts.identity,
        },
        warm_start=parts.warm_start,
        teacher=parts.teacher,
    )
    return setup, model


@dataclass(frozen=True)
class _Parts:
    """What the two kinds of model differ in."""

    tokenizer: PreTrainedTokenizerFast
    layout: Layout
    model: AnyModel
    identity: dict[str, str]
    """Hashes of what is the kind's own, as in `TrainingSetup.identity`."""
    warm_start: WarmStart | None = None
    teacher: Teacher | None = None


def _prompted_parts(recipe: Recipe, dataset: Dataset) -> _Parts:
    """Of a model that reads and writes titles."""
    titles, prompt, forced = titles_of(dataset), recipe.prompt, recipe.tokens.forced
    name = recipe.tokens.tokenizer or recipe.model.backbone
    if name is None:
        tokenizer = train_title_tokenizer(titles, prompt.template, recipe.tokens.vocab_size)
    else:
        tokenizer = load_tokenizer(name, roles=("eos_token",))
    words = build_title_words(tokenizer, titles, prompt.template, prompt.separator)
    eos_token = tokenizer.eos_token_id
    layout = make_prompt_layout(
        words,
        eos_token if tokenizer.pad_token is None else tokenizer.pad_token_id,
        recipe.model.max_tokens,
        prompt.max_titles,
        forced_of(words, forced),
    )
    vocab_size = max(len(tokenizer), int(words.tokens.max()) + 1)
    torch.manual_seed(mixed_key(recipe.seed, 0x1217) >> 1)
    model = build_prompted(recipe, layout, eos_token, vocab_size)
    model.config.certain_tokens = forced
    # Titles, template and tokenizer together.
    identity = {"origin": FRESH, "titles": hash_of_words(words.tokens, words.offsets)}
    if recipe.lora.rank:
        identity["backbone"] = hash_of_frozen(model.named_parameters())
    return _Parts(tokenizer, layout, model, identity)


def _coded_parts(recipe: Recipe, dataset: Dataset, soft_targets: bool) -> _Parts:
    """Of an encoder-decoder that reads and writes the words of codes; `soft_targets`: as of
    `build_setup`."""
    codes, num_masks = dataset.numbering, recipe.num_masks
    origin = None if recipe.init_from is None else open_origin(recipe.init_from)
    name = recipe.tokens.tokenizer or recipe.model.backbone
    if origin is not None:
        check_origin(origin, recipe, dataset)
        num_masks, known = origin.config.num_masks, len(origin.best.catalogue.item_codes)
        old, new = codes.item_codes[:known], codes.item_codes[known:]
        tokenizer = grow_tokenizer(origin.best.tokenizer, old, new)
    elif name is None:
        tokenizer = train_tokenizer(codes.item_codes, recipe.tokens.vocab_size, num_masks)
    else:
        key = "tokens.tokenizer" if recipe.tokens.tokenizer else "model.backbone"
        tokenizer = load_tokenizer(name, num_masks, key)
    words = build_words(tokenizer, codes.item_codes, codes.user_codes, num_masks)
    # The ids of a tokenizer can have gaps.
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
    identity = {"origin": FRESH if origin is None else origin.weights_hash}
    warm_start = None
    if origin is not None:
        model, warm_start = warm_start_model(origin, recipe, dataset, words, vocab_size, special)
    else:
        model = build_model(
            recipe.model,
            ModelSizes(
                vocab_size=vocab_size,
                num_users=words.num_users,
                num_items=words.num_items,
                num_masks=num_masks,
                special=special,
                ids_outside=recipe.optimizer.id_tables != "dense",
                vocabulary=words.vocabulary,
            ),
        )
        model.config.softmax = recipe.tokens.softmax
        known_N = None
        if recipe.model.init_items == "cooccurrence":
            num_factors = min(recipe.model.d_model, MOST_FACTORS)
            vectors_NF = neighbour_vectors(dataset.sequences, num_factors, recipe.seed)
            init_item_rows(model, vectors_NF, words)
            known_N = np.linalg.norm(vectors_NF, axis=1) > 0
        if recipe.model.item_text != "none":
            text_NF = item_vectors(dataset, recipe.model.item_text_source)
            trained_N = training_counts(dataset.sequences, recipe.trained_through) > 0
            add_texts(model, text_NF, words, trained_N, known_N)
            if recipe.model.item_text == "init":
                begin_with_texts(model)
            else:
                identity["item_text"] = hashlib.sha256(text_NF.tobytes()).hexdigest()
    model.config.certain_tokens = recipe.tokens.forced
    if recipe.tokens.softmax == "siblings":
        model.siblings = siblings_of(build_trie(*words.tokens_of_items()))
    teacher = None
    if recipe.finetune.distill.weight and recipe.tokens.softmax == "vocabulary":
        item_tokens(words, "finetune.distill.weight", "0")
    if recipe.finetune.distill.weight and soft_targets:
        teacher = soft_targets_of(
            dataset,
            recipe.trained_through,
            recipe.finetune.distill,
            recipe.text,
            exclude_history=exclude_history_default(dataset.sequences),
        )
        identity["soft_targets"] = hashlib.sha256(
            teacher.items_SK.tobytes() + teacher.shares_SK.tobytes()
        ).hexdigest()
    layout = make_layout(words, model.config)
    return _Parts(tokenizer, layout, model, identity, warm_start, teacher)


_MAY_CHANGE = (
    *MOVES_NO_GRADIENT,
    "init_from",
    "head",
    "packing",
    "step_graph",
    "activation_checkpointing",
    "deterministic",
)
"""Keys that may differ between a checkpoint and its resume: paths, the division into micro-batches,
the way the loss is computed. The weights that a run starts from have a hash of their own."""


def _recipe_hash(recipe: Recipe) -> str:
    """A hash of what must not change between a checkpoint and its resume."""
    values = with_old_keys(recipe.as_dict())  # so that checkpoints of earlier versions match
    old_names = {new: old for old, new in RENAMED_KEYS.items()}
    for key in _MAY_CHANGE:
        del values[old_names.get(key, key)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """The keys that a resume must not change and that differ, each with both values."""
    then, today = flat(before.as_dict()), flat(now.as_dict())
    return [
        f"{key} is {value} and was {then[key]}"
        for key, value in today.items()
        if key not in _MAY_CHANGE and value != then[key]
    ]


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a run would do (`--dry-run`): sizes and steps, and the loss of one batch. Nothing is
    written."""
    setup, model = build_setup(recipe, soft_targets=False)
    config, devices = model.config, Devices.of_this_process()
    recipe, _ = settle_micro_batches(recipe, setup.dataset, setup.words, model, devices)
    outside = with_ids_outside(config)
    share = StepBatches(setup.stages, setup.reader, setup.layout, recipe, 0, 1, outside)[0]
    tables = IdTables(model.config, recipe.seed, Ranks(), model.device)
    if setup.warm_start is not None:
        tables.begin_with(setup.warm_start.id_rows)
    tables.attach(model, share)
    first, parameters = share.micro_batches[-1], sum(p.numel() for p in model.parameters())
    with texts_in_table(model), torch.inference_mode():
        loss = float(loss_of_targets(model, first)) / max(first.num_target_tokens, 1)
    return {
        "users": setup.dataset.sequences.num_users,
        "items": setup.words.num_items,
        "parameters": parameters + tables.num_parameters,
        "vocabulary": model.config.vocab_size,
        "tokens an item": float(np.diff(setup.words.tokens_of_items()[1]).mean()),
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "first loss": loss,
        "stages": {
            s.name: {
                "samples": s.plan.num_samples,
                "users without a sample": s.plan.users_without_samples,
                "steps an epoch": s.epoch_steps,
                "epochs": s.stage.epochs,
                "first batch": list(first.encoder.input_ids.shape),
            }
            for s in setup.stages
        },
    }
