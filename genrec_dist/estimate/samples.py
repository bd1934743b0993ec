"""The samples of a run as far as their lengths go, from its data or from given sizes."""

# T target tokens

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.splits import num_held_out

from genrec_dist.config.recipe import Recipe, Stage
from genrec_dist.data.tokenizer import load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import WordTable, build_words, trim
from genrec_dist.estimate.memory.activations import MicroBatch
from genrec_dist.estimate.step_time import Rows

ASSUMED_ITEMS = (5, 5, 5, 6, 6, 7, 8, 10, 14, 24)
"""Items per user where there is no data: about the deciles of Beauty."""
ASSUMED_ITEM_TOKENS = 4
"""Sub-words of a user's or an item's word where the tokenizer is not at hand: ` item`, `_` and two
pieces of four digits."""


@dataclass(frozen=True)
class Samples:
    """The samples of a stage, as far as their lengths go."""

    stage: str
    lengths: np.ndarray
    """int64, encoder tokens of each sample, ascending."""
    windows: np.ndarray
    """int64, further sequences of the longest length that are encoded for each sample."""
    target_tokens: int
    """T of the longest target."""
    rows_per_sample: int
    """Decoder rows of a sequence, where `prefix_tokens` is None."""
    batch_size: int
    epochs: int
    epoch_samples: int
    """Samples of an epoch."""
    rows: Rows
    """On average: what decides the time, as the longest decide memory."""
    soft_items: int = 0
    """Of the soft target of each prefix; 0: there are none."""
    soft_bytes: int = 0
    """Of the soft targets of all prefixes."""
    prefix_tokens: tuple[int, float] | None = None
    """Of all-prefixes, where each item but the first has a decoder row: tokens of a sequence beside
    these items, and tokens of an item."""

    @functools.cached_property
    def quantiles(self) -> np.ndarray:
        """Lengths that represent all, the shortest and the longest among them."""
        shares = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        return np.unique(np.quantile(self.lengths, shares, method="nearest"))

    def micro_batch(self, samples: int, length: int) -> MicroBatch:
        rows = self.rows_per_sample
        if self.prefix_tokens is not None:
            beside, of_item = self.prefix_tokens
            rows = max(1, math.ceil((length - beside) / of_item))
        return MicroBatch(
            samples,
            length,
            self.target_tokens,
            rows,
            self.rows.shares_memory,
            self.soft_items,
        )

    def per_rank(self, gpus: int) -> int:
        """Samples of a step that a rank takes."""
        return -(-self.batch_size // gpus)


@dataclass(frozen=True)
class Catalogue:
    """What of the data decides sizes."""

    users: int
    items: int
    training_items: np.ndarray
    """int64, items of each user's training part; where sizes are given, of a few users who
    represent all."""
    source: str
    words: WordTable | None = None
    """None: the tokenizer is not at hand; a vocabulary to be trimmed is then counted whole."""
    vocabulary: int | None = None


def read_catalogue(recipe: Recipe, users: int | None, items: int | None) -> Catalogue:
    """Sizes, lengths and words of the recipe's data, or the given sizes."""
    if (users is None) != (items is None):
        raise ValueError("--users and --items belong together: give both or none")
    if users is not None and items is not None:
        if users < 1 or items < 1:
            raise ValueError(f"--users {users} --items {items}: both must be at least 1")
        source = f"given sizes; users of {min(ASSUMED_ITEMS)} to {max(ASSUMED_ITEMS)} items assumed"
        training_items = np.array(ASSUMED_ITEMS) - num_held_out(recipe.trained_through)
        return Catalogue(users, items, training_items, source)
    if not (Path(recipe.data) / "dataset.json").is_file():
        raise ValueError(
            f"{recipe.data}: no data directory there: give --users and --items, or set data in the "
            "recipe to one"
        )
    dataset = load_dataset(recipe.data)
    return catalogue_of(recipe, dataset, *_words(recipe, dataset))


def catalogue_of(
    recipe: Recipe, dataset: Dataset, words: WordTable | None, vocabulary: int | None = None
) -> Catalogue:
    """The same of data and words that are at hand."""
    sequences = dataset.sequences
    training_items = sequences.training_ends(recipe.trained_through) - sequences.offsets[:-1]
    sizes = sequences.num_users, sequences.num_items
    return Catalogue(*sizes, training_items, str(recipe.data), words, vocabulary)


def _words(recipe: Recipe, dataset: Dataset) -> tuple[WordTable | None, int | None]:
    """Words by the run's own tokenizer where it can be had without a network, and the size of the
    vocabulary."""
    name = recipe.tokens.tokenizer or recipe.model.backbone
    codes = dataset.numbering
    if name is None:
        tokenizer = train_tokenizer(codes.item_codes, recipe.tokens.vocab_size, recipe.num_masks)
    elif (Path(name) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(name, recipe.num_masks)
    else:
        return None, None
    words = build_words(tokenizer, codes.item_codes, codes.user_codes, recipe.num_masks)
    if recipe.tokens.trim:
        words = trim(words, tokenizer.pad_token_id)
        assert words.vocabulary is not None
        return words, words.vocabulary.size
    vocabulary = max(len(tokenizer), int(words.tokens.max()) + 1)
    return words, vocabulary if recipe.model.backbone is None else None


def stage_samples(recipe: Recipe, catalogue: Catalogue) -> list[Samples]:
    """Lengths of the samples of each stage that has epochs, all items taken to be of mean
    length."""
    stages = ("pretrain", recipe.pretrain), ("finetune", recipe.finetune)
    return [_samples(name, stage, recipe, catalogue) for name, stage in stages if stage.epochs]


def _samples(name: str, stage: Stage, recipe: Recipe, catalogue: Catalogue) -> Samples:
    training = catalogue.training_items[catalogue.training_items > 1]
    item_tokens, longest_item, user_tokens = float(ASSUMED_ITEM_TOKENS), ASSUMED_ITEM_TOKENS, 0
    if catalogue.words is not None:
        item_tokens = float(np.diff(catalogue.words.tokens_of_items()[1]).mean())
        longest_item = catalogue.words.longest_item
    if recipe.model.user_ids:
        words = catalogue.words
        user_tokens = ASSUMED_ITEM_TOKENS if words is None else words.longest_user
    histories = training - 1
    if stage.targets == "every-prefix":
        histories = np.concatenate([np.arange(1, length) for length in training])
    rows, masks, target = 1, 1, longest_item
    num_tokens, num_labels = item_tokens + 1, item_tokens + 1
    if recipe.tokens.forced == "given" and catalogue.words is not None:
        num_tokens, num_labels = _learned_tokens(*catalogue.words.tokens_of_items())
    per_sample, all_prefixes = 1.0, stage.targets == "all-prefixes"
    if recipe.model.encoder_unit == "item":
        item_tokens, user_tokens = 1.0, min(user_tokens, 1)
    if stage.targets == "mask" and stage.mask.strategy == "multi":
        rows = masks = stage.mask.k
        per_sample = float(rows)
    if stage.targets == "mask" and stage.mask.strategy == "span":
        target *= stage.mask.k
        num_tokens = num_labels = 1 + item_tokens * (1 + stage.mask.k) / 2
    items = np.ceil(np.maximum(histories + 1 - masks, 0) * item_tokens).astype(np.int64)
    lengths = 2 + user_tokens + masks + items
    order, longest = np.argsort(lengths, kind="stable"), recipe.model.max_tokens
    windows, prefix_tokens = np.zeros(len(lengths), np.int64), None
    if all_prefixes:
        prefix_tokens = 2 + user_tokens + masks, item_tokens
        # Each target whose history is too long is encoded alone, or one window for several.
        beyond = np.maximum(lengths - longest, 0) / item_tokens
        targets = 1.0 if stage.windows == "own" else longest / 2 / item_tokens
        windows = np.ceil(beyond / targets).astype(np.int64)
        per_sample = float(histories.sum() / (len(histories) + windows.sum()))
    share = catalogue.users / len(catalogue.training_items)
    soft_items = min(stage.distill.top, catalogue.items) if stage.distill.weight else 0
    return Samples(
        stage=name,
        lengths=np.minimum(lengths[order], longest),
        windows=windows[order],
        target_tokens=target + 1,
        rows_per_sample=rows,
        batch_size=stage.batch_size,
        epochs=stage.epochs,
        epoch_samples=round(share * len(lengths) * stage.epoch_fraction),
        rows=Rows(per_sample, num_tokens, num_labels, shares_memory=all_prefixes),
        soft_items=soft_items,
        # An item and its share each, and where each user's begin.
        soft_bytes=round(share * (int(histories.sum()) * soft_items * 8)) + 8 * catalogue.users
        if soft_items
        else 0,
        prefix_tokens=prefix_tokens,
    )


def _learned_tokens(tokens: np.ndarray, offsets: np.ndarray) -> tuple[float, float]:
    """(tokens of a decoder row, labels among them), the means over items, where tokens that the
    catalogue leaves no choice about are no labels. An item's end is a token too."""
    ends = np.split(tokens, offsets[1:-1])
    paths = [(*path.tolist(), None) for path in ends]
    following = defaultdict(set)
    for path in paths:
        for place, token in enumerate(path):
            following[path[:place]].add(token)
    learned = [
        [place for place in range(len(path)) if len(following[path[:place]]) > 1] for path in paths
    ]
    lengths = [places[-1] + 1 if places else 0 for places in learned]
    return float(np.mean(lengths)), float(np.mean([len(places) for places in learned]))
