"""Decoding titles beside Hugging Face's constrained `generate`: the same lists, and users per
second."""

# B users, L prompt tokens, N list

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.sequences import offsets_of
from transformers import AutoModelForCausalLM

from genrec_dist.bench.measure import Measured, in_turn, make_claim, processor_seconds, table
from genrec_dist.bench.peers.beam import allowed_tokens, compare_lists
from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import EncoderInput, encode_histories
from genrec_dist.data.layout import PromptLayout
from genrec_dist.data.prompt.title_words import (
    build_title_words,
    distinct_titles,
    make_prompt_layout,
    titles_of,
    train_title_tokenizer,
)
from genrec_dist.data.tokenizer import load_tokenizer
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.searcher import TopItems, TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.inference.load import load_run
from genrec_dist.model.causal.build import build_prompted
from genrec_dist.model.causal.prompted import PromptedModel

GENERATE = "Hugging Face's generate with prefix_allowed_tokens_fn"
SAME_SCORE = 1e-3
"""Scores of titles in float32 agree to this: they are sums over tokens through tens of layers."""
WORDS = [
    *("the", "of", "and", "night", "day", "star", "red", "blue", "dog", "cat", "house", "river"),
    *("king", "last", "first", "secret", "return", "world", "love", "dark", "city", "road"),
]


@dataclass(frozen=True)
class Sizes:
    users: int = 200
    batch: int = 20
    beam: int = 20
    items: int = 1500
    """Of the catalogue that is made up where there is no data."""
    repeats: int = 5
    clock: Literal["wall", "processor"] = "wall"
    """What is timed: seconds that pass, or those of the processor (`processor_seconds`)."""


@dataclass(frozen=True)
class World:
    """A model, and histories to continue."""

    model: PromptedModel
    layout: PromptLayout
    searcher: TrieSearcher
    histories: list[np.ndarray]

    def batch(self, first: int, size: int) -> EncoderInput:
        """The prompts of some users up to their tail."""
        histories = self.histories[first : first + size]
        offsets = offsets_of(np.array([len(items) for items in histories]))
        unknown = np.full(len(histories), -1)
        return encode_histories(np.concatenate(histories), offsets, unknown, self.layout)


def bench_titles(
    data: Path | None = None,
    run: Path | None = None,
    sizes: Sizes = Sizes(),
    settings: Sequence[str] = (),
) -> Measured:
    """Claims and their table.

    Args:
        data: directory of `genrec prepare` with titles; None: titles made of a few words.
        run: a run with a prompt; None: a model of the recipe llama, not trained.
        sizes: of the measurement.
        settings: `key=value` of that recipe; with `model.backbone` the model has its weights.
    """
    world = _make_world(data, run, sizes, settings)
    parts = [
        (world.batch(first, sizes.batch), min(sizes.batch, sizes.users - first))
        for first in range(0, sizes.users, sizes.batch)
    ]
    theirs = HuggingFace(world.model, world.layout)
    generated: list[TopItems] = []

    def search() -> None:
        for encoder, _ in parts:
            world.searcher.search(encoder, beam=sizes.beam, top=sizes.beam)

    def generate() -> None:
        generated[:] = [theirs.lists(encoder, sizes.beam) for encoder, _ in parts]

    rivals: dict[str, Callable[[], object]] = {"ours": search, GENERATE: generate}
    clock = processor_seconds if sizes.clock == "processor" else time.perf_counter
    seconds = in_turn(rivals, sizes.repeats, False, clock)
    compared = []
    for (encoder, _), lists in zip(parts, generated, strict=True):
        # By the rule of `generate` for what becomes of an item that ends at a beam.
        ours = world.searcher.search(encoder, beam=sizes.beam, top=sizes.beam, ends="ranked")
        compared.append(compare_lists(ours, lists, SAME_SCORE))
    rates = {name: sizes.users / median(values) for name, values in seconds.items()}
    claim = make_claim(
        f"titles, {sizes.users} users, beam {sizes.beam}, {sizes.clock} time, lists of both "
        "compared",
        GENERATE,
        rates["ours"],
        rates[GENERATE],
        "users/s",
        ">= 10x",
    )
    measured = {
        "users": sizes.users,
        "batch": sizes.batch,
        "beam": sizes.beam,
        "items": world.layout.words.num_items,
        "tokens a title": float(np.diff(world.layout.words.tokens_of_items()[1]).mean()),
        "prompt tokens": float(np.mean([e.attention_mask.sum(1).float().mean() for e, _ in parts])),
        "parameters": sum(p.numel() for p in world.model.parameters()),
        "items that differ": sum(each["items that differ"] for each in compared),
        "largest difference of scores": max(
            each["largest difference of scores"] for each in compared
        ),
        "clock": sizes.clock,
        "load": os.getloadavg(),
        "seconds": seconds,
        "users a second": rates,
    }
    return [claim], table("titles", [claim], measured=measured)


def _make_world(
    data: Path | None, run: Path | None, sizes: Sizes, settings: Sequence[str]
) -> World:
    dice = np.random.default_rng(0)
    if run is not None:
        loaded = load_run(run)
        if not isinstance(loaded.layout, PromptLayout):
            raise ValueError(f"{run}: its model has no prompt: give a run of the recipe llama")
        model, layout, searcher = loaded.model, loaded.layout, loaded.searcher
    else:
        titles = None if data is None else titles_of(load_dataset(data))
        titles = titles or made_up_titles(sizes.items, dice)
        model, layout = untrained_prompted(titles, settings)
        searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    num_items = layout.words.num_items
    histories = [
        dice.choice(num_items, dice.integers(5, 21), replace=False).astype(np.int32)
        for _ in range(sizes.users)
    ]
    if data is not None:
        sequences = load_dataset(data).sequences
        histories = [sequences.items[a:b] for a, b in pairwise(sequences.offsets)][: sizes.users]
    return World(model, layout, searcher, histories)


def made_up_titles(num_items: int, dice: np.random.Generator) -> list[str]:
    """Titles of one to six words; some are equal, some begin others."""
    return distinct_titles(
        [" ".join(dice.choice(WORDS, dice.integers(1, 7))) for _ in range(num_items)]
    )


def untrained_prompted(
    titles: Sequence[str], settings: Sequence[str] = ()
) -> tuple[PromptedModel, PromptLayout]:
    """A model of the recipe llama: a backbone's weights where the settings name one, otherwise
    random ones, large enough that scores lie apart.

    Args:
        titles: no two equal.
        settings: `key=value` of the recipe.
    """
    recipe = load_recipe("llama", ["model.init_std=0.2", *settings])
    template, separator = recipe.prompt.template, recipe.prompt.separator
    if recipe.model.backbone is None:
        tokenizer = train_title_tokenizer(titles, template, recipe.tokens.vocab_size)
    else:
        tokenizer = load_tokenizer(recipe.model.backbone, roles=("eos_token",))
    words = build_title_words(tokenizer, titles, template, separator)
    eos_token = tokenizer.eos_token_id
    layout = make_prompt_layout(
        words,
        eos_token if tokenizer.pad_token is None else tokenizer.pad_token_id,
        recipe.model.max_tokens,
        recipe.prompt.max_titles,
    )
    torch.manual_seed(0)
    return build_prompted(recipe, layout, eos_token, len(tokenizer)).eval(), layout


class HuggingFace:
    """The same weights under transformers' own attention, decoded by its `generate`."""

    def __init__(self, model: PromptedModel, layout: PromptLayout):
        self.eos, self.layout = model.config.eos_token_id, layout
        self.lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.lm.config),
            attn_implementation="sdpa",
            dtype=model.head_weight.dtype,
        )
        self.lm.load_state_dict(model.lm.state_dict())
        self.lm.eval()
        self.after = allowed_tokens(layout.words, self.eos)

    @torch.inference_mode()
    def generate(self, encoder: EncoderInput, beam: int, **options: Any) -> Any:
        """Beams without sampling and without a length penalty, each an item of the catalogue."""
        tail = self.layout.tail.tolist()
        prompts = [
            [*row[mask].tolist(), *tail]
            for row, mask in zip(encoder.input_ids, encoder.attention_mask, strict=True)
        ]
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        pad = self.layout.pad_token
        rows = [[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        shown = torch.arange(width) >= torch.tensor(padding)[:, None]
        settings = {
            "prefix_allowed_tokens_fn": lambda _, ids: self.after.get(
                tuple(ids[width:].tolist()), [self.eos]
            ),
            "num_beams": beam,
            "num_return_sequences": beam,
            "length_penalty": 0.0,
            "early_stopping": "never",
            "max_new_tokens": self.layout.words.longest_item + 2,
            "do_sample": False,
            "eos_token_id": self.eos,
            "pad_token_id": pad,
            "output_scores": True,
            "return_dict_in_generate": True,
        }
        return self.lm.generate(
            input_ids=torch.tensor(rows), attention_mask=shown.long(), **settings | options
        )

    def lists(self, encoder: EncoderInput, beam: int, **options: Any) -> TopItems:
        """What it generates as lists; -1 where a sequence is no item."""
        output = self.generate(encoder, beam, **options)
        width = int(encoder.attention_mask.sum(1).max()) + len(self.layout.tail)
        row_of = rows_by_tokens(self.layout.words)
        rows = []
        for sequence in output.sequences[:, width:].tolist():
            answer = sequence[: sequence.index(self.eos)] if self.eos in sequence else sequence
            rows.append(row_of.get(tuple(answer), -1))
        scores_BN = output.sequences_scores.view(len(encoder.input_ids), -1).float().numpy()
        return TopItems(np.array(rows, np.int32).reshape(scores_BN.shape), scores_BN)


def rows_by_tokens(words: WordTable) -> dict[tuple[int, ...], int]:
    """The item of each token string."""
    tokens, offsets = words.tokens_of_items()
    return {tuple(tokens[a:b].tolist()): row for row, (a, b) in enumerate(pairwise(offsets))}
