"""What a recipe needs before a GPU is rented: which method fits, the largest micro-batch, the time,
and advice."""

# L input tokens, T target tokens

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.splits import num_held_out

from genrec_dist.config.recipe import Recipe, Stage
from genrec_dist.data.batch import Work
from genrec_dist.data.fit_recipe import DataFacts, fit_recipe, resolve_recipe
from genrec_dist.data.tokenizer import load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import WordTable, build_words, trim
from genrec_dist.estimate.activations import MicroBatch, activation_bytes, compute_of
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import CARDS
from genrec_dist.estimate.sizes import ParameterCounts, build_config, count_parameters
from genrec_dist.estimate.state import METHODS, Method, State, read_settings, state_bytes
from genrec_dist.model.genrec import GenRecConfig

GIB = 2**30
RESERVE_GIB = 1.5
"""Kept free for the CUDA context, libraries' workspaces and fragmentation; not measured."""
ASSUMED_ITEMS = (5, 5, 5, 6, 6, 7, 8, 10, 14, 24)
"""Items per user where there is no data: about the deciles of Beauty."""
ASSUMED_ITEM_TOKENS = 4
"""Sub-words of a user's or an item's word where the tokenizer is not at hand: ` item`, `_` and two
pieces of four digits."""
MFU = 0.4
"""Share of a card's peak that training on real tokens is taken to reach."""

MOST_GPUS, MOST_GIB, MOST_ROWS = 65_536, 65_536, 2**31 - 1
"""Sizes beyond those of any machine or data, which are refused."""
LARGEST_SEARCHED = 1 << 24
_STEP = 256


@dataclass(frozen=True)
class Samples:
    """The samples of a stage, as far as their lengths go."""

    stage: str
    lengths: np.ndarray
    """int64, encoder tokens of each sample, ascending."""
    target_tokens: int
    """T of the longest target."""
    rows_per_sample: int
    batch_size: int
    epochs: int
    epoch_samples: int
    """Samples of an epoch."""

    @property
    def quantiles(self) -> np.ndarray:
        """Lengths that represent all, the shortest and the longest among them."""
        shares = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        return np.unique(np.quantile(self.lengths, shares, method="nearest"))

    def micro_batch(self, samples: int, length: int) -> MicroBatch:
        return MicroBatch(samples, length, self.target_tokens, self.rows_per_sample)

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


@dataclass(frozen=True)
class Fit:
    """One way to spread the weights."""

    method: Method
    state: State
    peak: int
    """Bytes on the GPU at their most, with the recipe's micro-batches."""
    largest: int
    """The largest `micro_batch_tokens` that fits; 0: not even the longest sample."""

    def fits(self, limit: float) -> bool:
        return self.peak <= limit


@dataclass(frozen=True)
class Duration:
    epoch_seconds: float
    total_seconds: float
    assumption: str


@dataclass(frozen=True)
class Forecast:
    recipe: Recipe
    gpus: int
    memory_gib: float
    sizes: ParameterCounts
    catalogue: Catalogue
    samples: list[Samples]
    fits: list[Fit]
    step_flops: dict[str, float]
    """Floating-point operations of a step over all GPUs, by stage, padding left out."""
    duration: dict[str, Duration]

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        return (self.memory_gib - RESERVE_GIB) * GIB


def forecast(
    recipe: Recipe,
    *,
    gpus: int = 1,
    memory_gib: float = 24.0,
    users: int | None = None,
    items: int | None = None,
    zero_files: Path | None = None,
    card: str | None = None,
    tflops: float | None = None,
) -> Forecast:
    """Estimate memory and time of a recipe; nothing is trained, downloaded or written.

    Args:
        recipe: What is to be trained.
        gpus: GPUs that the run is spread over.
        memory_gib: GiB of each.
        users: With `items`, sizes in place of the recipe's data directory.
        items: See `users`.
        zero_files: Directory of zero0.json ... whose bucket sizes count.
        card: Name of a card whose published peak gives the time.
        tflops: TFLOP/s that a GPU really reaches, in place of `card`.

    Raises:
        ValueError: Where sizes are missing or do not fit, or the model has a prompt.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise ValueError(f"--gpus {gpus}: it has to be from 1 to {MOST_GPUS:,}")
    if not memory_gib <= MOST_GIB:  # not a number either
        raise ValueError(f"--memory {memory_gib:g}: it has to be GiB of one GPU, to {MOST_GIB:,}")
    if recipe.prompt.template:
        raise ValueError(
            "prompt.template: memory and time of a model with a prompt are not foretold; "
            "`genrec train --dry-run` says its sizes"
        )
    if memory_gib <= RESERVE_GIB:
        raise ValueError(
            f"--memory {memory_gib:g}: {RESERVE_GIB} GiB of it are kept free; give more"
        )
    if (users or 0) > MOST_ROWS or (items or 0) > MOST_ROWS:
        raise ValueError(f"--users {users} --items {items}: rows are int32, {MOST_ROWS:,} at most")
    if recipe.from_data and users is not None and items is not None:
        lengths = np.array(ASSUMED_ITEMS) - num_held_out(recipe.trained_through)
        recipe, _ = fit_recipe(recipe, DataFacts(items, np.resize(lengths, max(users, 1))))
    elif recipe.from_data:
        recipe, _ = resolve_recipe(recipe)
    catalogue = read_catalogue(recipe, users, items)
    trimmed = catalogue.words.vocabulary if catalogue.words is not None else None
    config = build_config(
        recipe,
        catalogue.users,
        catalogue.items,
        catalogue.vocabulary,
        spoken=trimmed.num_outputs if trimmed is not None else 0,
    )
    samples = stage_samples(recipe, catalogue)
    flops_per_sample = {}
    for each in samples:
        lengths, counts = np.unique(each.lengths, return_counts=True)
        found = [step_flops(config, each.micro_batch(1, int(length))) for length in lengths]
        flops_per_sample[each.stage] = float(np.average(found, weights=counts))
    speed, duration = _speed(recipe, card, tflops), {}
    if speed is not None:
        for each in samples:
            operations = flops_per_sample[each.stage] * each.epoch_samples
            seconds = operations / (gpus * speed[0] * 1e12)
            duration[each.stage] = Duration(seconds, seconds * each.epochs, speed[1])
    plan = Forecast(
        recipe=recipe,
        gpus=gpus,
        memory_gib=memory_gib,
        sizes=count_parameters(recipe, config),
        catalogue=catalogue,
        samples=samples,
        fits=[],
        step_flops={each.stage: flops_per_sample[each.stage] * each.batch_size for each in samples},
        duration=duration,
    )
    fits = [_fit(plan, config, method, zero_files) for method in METHODS]
    return dataclasses.replace(plan, fits=fits)


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
    sequences = dataset.sequences
    training_items = sequences.training_ends(recipe.trained_through) - sequences.offsets[:-1]
    words, vocabulary = _words(recipe, dataset)
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
    if stage.targets == "all-prefixes":
        rows = math.ceil(float(histories.mean()))
    if recipe.model.encoder_unit == "item":
        item_tokens, user_tokens = 1.0, min(user_tokens, 1)
    if stage.targets == "mask" and stage.mask.strategy == "multi":
        rows = masks = stage.mask.k
    if stage.targets == "mask" and stage.mask.strategy == "span":
        target *= stage.mask.k
    items = np.ceil(np.maximum(histories + 1 - masks, 0) * item_tokens).astype(np.int64)
    lengths = 2 + user_tokens + masks + items
    share = catalogue.users / len(catalogue.training_items)
    return Samples(
        stage=name,
        lengths=np.sort(np.minimum(lengths, recipe.model.max_tokens)),
        target_tokens=target + 1,
        rows_per_sample=rows,
        batch_size=stage.batch_size,
        epochs=stage.epochs,
        epoch_samples=round(share * len(lengths)),
    )


def step_flops(config: GenRecConfig, batch: MicroBatch) -> float:
    """Floating-point operations of forward and backward of full rectangles."""
    rows, length = batch.samples * batch.rows_per_sample, batch.input_tokens
    work = Work(
        inputs=batch.samples * length,
        targets=rows * batch.target_tokens,
        labels=rows * batch.target_tokens,
        encoder_pairs=batch.samples * length**2,
        decoder_pairs=rows * batch.target_tokens**2,
        cross_pairs=rows * batch.target_tokens * length,
    )
    return flops(config, work)


def _fit(plan: Forecast, config: GenRecConfig, method: Method, zero_files: Path | None) -> Fit:
    recipe, gpus = plan.recipe, plan.gpus
    bf16 = recipe.precision != "fp32"
    compute = compute_of(method, bf16)
    head = "full" if recipe.head == "auto" else recipe.head  # what `auto` means on a GPU
    # At most one user per sample, and each token an item of its own.
    id_rows = [each.per_rank(gpus) * (1 + each.lengths.mean()) for each in plan.samples]
    state = state_bytes(
        plan.sizes,
        method,
        gpus,
        bf16,
        settings=read_settings(zero_files, method),
        average=recipe.optimizer.ema_decay > 0,
        step_id_rows=int(max(id_rows)),
    )

    def peak(tokens: int, whole_steps: bool) -> int:
        """Bytes with micro-batches of so many tokens, of samples of one length each; `whole_steps`:
        with no more of them than a rank's share of a step has."""
        most = 0
        for each in plan.samples:
            for length in map(int, each.quantiles):
                count = max(1, tokens // length)
                if whole_steps:
                    count = min(count, each.per_rank(gpus))
                batch = each.micro_batch(count, length)
                found = activation_bytes(config, plan.sizes, batch, compute, head=head)
                most = max(most, found.total)
        return state.peak(most)

    largest = _largest(lambda tokens: peak(tokens, False) <= plan.limit)
    return Fit(method, state, peak(recipe.micro_batch_tokens, True), largest)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 that fits, which is monotone; 0 if none does."""
    low, high = 0, LARGEST_SEARCHED // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP


def _speed(recipe: Recipe, card: str | None, tflops: float | None) -> tuple[float, str] | None:
    """(TFLOP/s per GPU, how that is known), None where nothing is stated."""
    if card is not None and tflops is not None:
        raise ValueError("--card and --tflops: give one of them")
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise ValueError(f"--tflops {tflops}: it has to be above 0")
        return tflops, f"{tflops:g} TFLOP/s per GPU, as given"
    if card is None:
        return None
    if card not in CARDS:
        raise ValueError(f"--card {card}: known are {', '.join(CARDS)}; or give --tflops")
    peak = CARDS[card][recipe.precision != "fp32"]
    return peak * MFU, f"published peak of {peak:g} TFLOP/s x {MFU:g} assumed, not measured"
