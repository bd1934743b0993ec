"""What a recipe needs before a GPU is rented: which method fits, the largest micro-batch, the time,
and plain advice."""

# L input tokens, T target tokens

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.splits import num_held_out
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from genrec_dist.config.recipe import HeadLoss, Recipe, Stage
from genrec_dist.data.tokenizer import load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import WordTable, build_words, trim
from genrec_dist.estimate.hardware import CARDS
from genrec_dist.estimate.memory import (
    METHODS,
    Method,
    MicroBatch,
    Sizes,
    State,
    activation_bytes,
    build_config,
    compute_of,
    measure_sizes,
    read_settings,
    state_bytes,
    step_flops,
)
from genrec_dist.model.genrec import GenRecConfig

GIB = 2**30
RESERVE_GIB = 1.5
"""Kept free for the CUDA context, libraries' workspaces and fragmentation; not measured."""
ASSUMED_ITEMS = (5, 5, 5, 6, 6, 7, 8, 10, 14, 24)
"""Items a user where there is no data: about the deciles of Beauty."""
ASSUMED_ITEM_TOKENS = 4
"""Sub-words of a user's or an item's word where the tokenizer is not at hand: ` item`, `_` and two
pieces of four digits."""
MFU = 0.4
"""Share of a card's peak that training on real tokens is taken to reach."""

LARGEST_SEARCHED = 1 << 24
_STEP = 256
_BY_COST: tuple[Method, ...] = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
"""From the fastest to the slowest; stage 0 holds no less than DDP."""
_NAMES: dict[Method, str] = {
    "ddp": "DDP",
    "zero0": "ZeRO 0",
    "zero1": "ZeRO 1",
    "zero2": "ZeRO 2",
    "zero3": "ZeRO 3",
    "zero2_offload": "ZeRO 2 + offload",
    "zero3_offload": "ZeRO 3 + offload",
}


@dataclass(frozen=True)
class Samples:
    """The samples of a stage, as far as their lengths go."""

    stage: str
    lengths: np.ndarray
    """int64, encoder tokens of each sample, ascending."""
    target_tokens: int
    """T of the longest target."""
    rows_a_sample: int
    batch_size: int
    epochs: int
    epoch_samples: int
    """Samples of an epoch."""

    @property
    def quantiles(self) -> np.ndarray:
        """Lengths that stand for all, the shortest and the longest among them."""
        return np.unique(
            np.quantile(self.lengths, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1), method="nearest")
        )


@dataclass(frozen=True)
class Catalogue:
    """What of the data decides sizes."""

    users: int
    items: int
    training_items: np.ndarray
    """int64, items of each user's training part; where sizes are stated, of a few users who stand
    for all."""
    words: WordTable | None
    """None: the tokenizer is not at hand; a vocabulary to be trimmed is then counted whole."""
    vocabulary: int | None
    source: str


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
    sizes: Sizes
    catalogue: Catalogue
    samples: list[Samples]
    fits: list[Fit]
    step_flops: dict[str, float]
    """Floating-point operations of a step over all GPUs, by stage, padding left out."""
    duration: dict[str, Duration]
    advice: list[str]

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        return usable_bytes(self.memory_gib)


def usable_bytes(memory_gib: float) -> float:
    return (memory_gib - RESERVE_GIB) * GIB


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
    """Work out a recipe on `gpus` GPUs of `memory_gib` each; nothing is trained, downloaded or
    written.

    `users`, `items`: sizes in place of the recipe's data directory. `zero_files`: directory of
    zero0.json ... whose bucket sizes count. `tflops`: TFLOP/s a GPU really reaches. Raises
    ValueError where sizes are missing or do not fit."""
    if memory_gib <= RESERVE_GIB:
        raise ValueError(
            f"--memory {memory_gib:g}: {RESERVE_GIB} GiB of it are kept free; give more"
        )
    catalogue = read_catalogue(recipe, users, items)
    trimmed = catalogue.words.vocabulary if catalogue.words is not None else None
    spoken = trimmed.num_outputs if trimmed is not None else 0
    config = build_config(recipe, catalogue.users, catalogue.items, catalogue.vocabulary, spoken)
    sizes = measure_sizes(recipe, config)
    samples = stage_samples(recipe, catalogue)
    limit = usable_bytes(memory_gib)
    fits = [
        _fit(recipe, config, sizes, samples, method, gpus, limit, zero_files) for method in METHODS
    ]
    flops = {each.stage: _flops_a_sample(config, each) * each.batch_size for each in samples}
    speed = _speed(recipe, card, tflops)
    result = Forecast(
        recipe, gpus, memory_gib, sizes, catalogue, samples, fits, flops,
        {} if speed is None else {each.stage: _duration(config, each, gpus, *speed) for each in samples}, [],
    )  # fmt: skip
    return dataclasses.replace(result, advice=advise(result))


def read_catalogue(recipe: Recipe, users: int | None, items: int | None) -> Catalogue:
    """Sizes, lengths and words of the recipe's data, or stated ones."""
    if (users is None) != (items is None):
        raise ValueError("--users and --items belong together: give both or none")
    if users is not None and items is not None:
        if users < 1 or items < 1:
            raise ValueError(f"--users {users} --items {items}: both must be at least 1")
        source = f"given sizes; users of {min(ASSUMED_ITEMS)} to {max(ASSUMED_ITEMS)} items assumed"
        return Catalogue(
            users,
            items,
            np.array(ASSUMED_ITEMS) - num_held_out(recipe.trained_through),
            None,
            None,
            source,
        )
    if not (Path(recipe.data) / "dataset.json").is_file():
        raise ValueError(
            f"{recipe.data}: no data directory there: give --users and --items, or set data to one"
        )
    dataset = load_dataset(recipe.data)
    words, vocabulary = _words(recipe, dataset)
    sequences = dataset.sequences
    training_items = sequences.training_ends(recipe.trained_through) - sequences.offsets[:-1]
    return Catalogue(
        sequences.num_users,
        sequences.num_items,
        training_items,
        words,
        vocabulary,
        str(recipe.data),
    )


def _words(recipe: Recipe, dataset: Dataset) -> tuple[WordTable | None, int | None]:
    """Words by the run's own tokenizer where it can be had without a network."""
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
    training = catalogue.training_items
    return [
        _samples(name, stage, training[training > 1], recipe, catalogue)
        for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune))
        if stage.epochs
    ]


def _samples(
    name: str, stage: Stage, training: np.ndarray, recipe: Recipe, catalogue: Catalogue
) -> Samples:
    item_tokens, longest_item, user_tokens = _word_tokens(recipe, catalogue)
    histories = training - 1
    if stage.targets == "every-prefix":
        histories = np.concatenate([np.arange(1, length) for length in training])
    rows = masks = 1
    target = longest_item
    if stage.targets == "all-prefixes":
        rows = math.ceil(float(histories.mean()))
    if recipe.model.encoder_unit == "item":
        item_tokens, user_tokens = 1.0, min(user_tokens, 1)
    if stage.targets == "mask" and stage.mask.strategy == "multi":
        rows = masks = stage.mask.k
    if stage.targets == "mask" and stage.mask.strategy == "span":
        target *= stage.mask.k
    lengths = (
        2
        + user_tokens
        + masks
        + np.ceil(np.maximum(histories + 1 - masks, 0) * item_tokens).astype(np.int64)
    )
    share = catalogue.users / len(catalogue.training_items)
    return Samples(
        name,
        np.sort(np.minimum(lengths, recipe.model.max_tokens)),
        target + 1,
        rows,
        stage.batch_size,
        stage.epochs,
        round(share * len(lengths)),
    )


def _word_tokens(recipe: Recipe, catalogue: Catalogue) -> tuple[float, int, int]:
    """Sub-words of: the mean item, the longest item, a user."""
    words = catalogue.words
    if words is None:
        return (
            ASSUMED_ITEM_TOKENS,
            ASSUMED_ITEM_TOKENS,
            ASSUMED_ITEM_TOKENS if recipe.model.user_ids else 0,
        )
    mean = float(np.diff(words.tokens_of_items()[1]).mean())
    return mean, words.longest_item, words.longest_user if recipe.model.user_ids else 0


def _fit(
    recipe: Recipe,
    config: GenRecConfig,
    sizes: Sizes,
    samples: list[Samples],
    method: Method,
    gpus: int,
    limit: float,
    zero_files: Path | None,
) -> Fit:
    bf16 = recipe.precision != "fp32"
    head: HeadLoss = "full" if recipe.head == "auto" else recipe.head  # what `auto` means on a GPU
    state = state_bytes(
        sizes,
        method,
        gpus,
        bf16,
        settings=read_settings(zero_files, method),
        average=recipe.optimizer.ema_decay > 0,
        step_id_rows=max(_step_id_rows(each, gpus) for each in samples),
    )

    def peak(tokens: int, whole_steps: bool) -> int:
        batches = (
            _micro_batch(each, int(length), tokens, gpus if whole_steps else None)
            for each in samples
            for length in each.quantiles
        )
        compute = compute_of(method, bf16)
        return state.peak(
            max(
                activation_bytes(config, sizes, batch, compute, head=head).total
                for batch in batches
            )
        )

    return Fit(
        method,
        state,
        peak(recipe.micro_batch_tokens, True),
        _largest(lambda tokens: peak(tokens, False) <= limit),
    )


def _micro_batch(samples: Samples, length: int, tokens: int, gpus: int | None) -> MicroBatch:
    """The samples of one length that go in at once; `gpus`: no more than a rank's share of a step
    has."""
    count = max(1, tokens // length)
    if gpus is not None:
        count = min(count, -(-samples.batch_size // gpus))
    return MicroBatch(count, length, samples.target_tokens, samples.rows_a_sample)


def _step_id_rows(samples: Samples, gpus: int) -> int:
    """At most one user and each token an item of its own."""
    share = -(-samples.batch_size // gpus)
    return share + int(share * samples.lengths.mean())


def _largest(fits: Any) -> int:
    """The largest multiple of 256 that fits, which is monotone; 0 if none does."""
    low, high = 0, LARGEST_SEARCHED // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP


def _flops_a_sample(config: GenRecConfig, samples: Samples) -> float:
    found, counts = np.unique(samples.lengths, return_counts=True)
    each = [
        step_flops(config, MicroBatch(1, int(length), samples.target_tokens, samples.rows_a_sample))
        for length in found
    ]
    return float(np.average(each, weights=counts))


def _speed(recipe: Recipe, card: str | None, tflops: float | None) -> tuple[float, str] | None:
    if card is not None and tflops is not None:
        raise ValueError("--card and --tflops: give one of them")
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise ValueError(f"--tflops {tflops}: it has to be above 0")
        return tflops, f"{tflops:g} TFLOP/s a GPU, as given"
    if card is None:
        return None
    if card not in CARDS:
        raise ValueError(f"--card {card}: known are {', '.join(CARDS)}; or give --tflops")
    peak = CARDS[card][recipe.precision != "fp32"]
    return peak * MFU, f"published peak of {peak:g} TFLOP/s x {MFU:g} assumed, not measured"


def _duration(
    config: GenRecConfig, samples: Samples, gpus: int, tflops: float, assumption: str
) -> Duration:
    epoch = _flops_a_sample(config, samples) * samples.epoch_samples / (gpus * tflops * 1e12)
    return Duration(epoch, epoch * samples.epochs, assumption)


def advise(plan: Forecast) -> list[str]:
    """What to do, in whole sentences."""
    methods = (
        _BY_COST if plan.recipe.precision != "fp16" else _BY_COST[:1]
    )  # training refuses fp16 under DeepSpeed
    fitting = [
        fit
        for method in methods
        for fit in plan.fits
        if fit.method == method and fit.fits(plan.limit)
    ]
    ddp = plan.fits[0]
    lines = []
    if ddp in fitting:
        lines += _advise_ddp(plan, ddp)
    elif fitting:
        best = fitting[0]
        lines.append(
            f"DDP needs {gib(ddp.peak)} of {gib(plan.limit)}: use {_NAMES[best.method]}, the fastest method that fits "
            f"({gib(best.peak)})."
        )
    else:
        lines += _advise_lowering(plan)
    for fit in fitting[:1]:
        lines += _advise_micro_batch(plan, fit)
    if plan.sizes.ids > plan.sizes.parameters / 2 and not plan.sizes.ids_outside:
        share = plan.sizes.ids / plan.sizes.parameters
        lines.append(
            f"The id tables are {share:.0%} of the parameters: optimizer.id_tables row-adagrad takes them out of AdamW, "
            "gradients and ZeRO and spreads their rows over the GPUs; model.id_dim 64 makes them narrow."
        )
    return lines


def _advise_ddp(plan: Forecast, ddp: Fit) -> list[str]:
    states = 16 * plan.sizes.dense
    size = f"the states of {plan.sizes.dense / 1e6:,.0f} M parameters are {states / 1e9:.1f} GB"
    if plan.gpus == 1:
        return [
            f"Use one process without ZeRO: {size}, they fit, and with one GPU there is nothing to spread."
        ]
    return [
        f"Use DDP, ZeRO is slower here: {size} and fit on each GPU. DDP sums gradients once a step, while backward is "
        "still running; ZeRO 1 and 2 then also send the weights around, ZeRO 3 fetches them for every forward and backward, "
        "and offload moves them through the host. All that buys is memory that is not short."
    ]


def _advise_micro_batch(plan: Forecast, fit: Fit) -> list[str]:
    tokens, share = (
        plan.recipe.micro_batch_tokens,
        max(_step_tokens(each, plan.gpus) for each in plan.samples),
    )
    if fit.largest < min(tokens, share):
        return [
            f"micro_batch_tokens {tokens:,} only fits as steps are small; at most {fit.largest:,} fits by itself."
        ]
    if tokens >= share:
        return [
            f"A rank's share of a step has at most {share:,} encoder tokens and goes through at once: "
            "a larger micro_batch_tokens changes nothing."
        ]
    return [f"micro_batch_tokens can rise from {tokens:,} to {min(fit.largest, share):,}."]


def _step_tokens(samples: Samples, gpus: int) -> int:
    return -(-samples.batch_size // gpus) * int(samples.lengths[-1])


def _advise_lowering(plan: Forecast) -> list[str]:
    best = min(plan.fits, key=lambda fit: fit.peak)
    lines = [
        f"Nothing fits: {_NAMES[best.method]} needs least, {gib(best.peak)} of {gib(plan.limit)}."
    ]
    with_room = [fit for fit in plan.fits if fit.largest >= plan.recipe.model.max_tokens]
    if with_room:
        order = {method: place for place, method in enumerate(_BY_COST)}
        first = min(with_room, key=lambda fit: order.get(fit.method, len(order)))
        return [
            *lines,
            f"Lower micro_batch_tokens to {first.largest:,} with {_NAMES[first.method]}: the step and its gradient stay the same.",
        ]
    ways = ["model.max_tokens"] if plan.recipe.model.max_tokens > 128 else []
    if plan.sizes.ids > plan.sizes.parameters / 10 and not plan.sizes.ids_outside:
        ways.append("model.id_dim, or set optimizer.id_tables to row-adagrad")
    if plan.recipe.precision == "fp32":
        ways.append("precision, to bf16")
    ways.append("the backbone's size, or take more GPUs under ZeRO 3")
    return [*lines, f"Not one longest sample fits. Lower {'; '.join(ways)}."]


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def as_dict(plan: Forecast) -> dict[str, Any]:
    """All of it as JSON values; sizes in bytes."""
    return {
        "data": plan.catalogue.source,
        "users": plan.catalogue.users,
        "items": plan.catalogue.items,
        "parameters": plan.sizes.parameters,
        "id_parameters": plan.sizes.ids,
        "precision": plan.recipe.precision,
        "micro_batch_tokens": plan.recipe.micro_batch_tokens,
        "gpus": plan.gpus,
        "memory_gib": plan.memory_gib,
        "reserve_gib": RESERVE_GIB,
        "methods": [
            {
                "method": fit.method,
                "fits": fit.fits(plan.limit),
                "peak": fit.peak,
                "largest_micro_batch_tokens": fit.largest,
                "state": {**dataclasses.asdict(fit.state), "total": fit.state.total},
            }
            for fit in plan.fits
        ],
        "stages": [
            {
                "stage": each.stage,
                "epoch_samples": each.epoch_samples,
                "mean_tokens": float(each.lengths.mean()),
                "longest_tokens": int(each.lengths[-1]),
                "target_tokens": each.target_tokens,
                "step_flops": plan.step_flops[each.stage],
                "duration": dataclasses.asdict(plan.duration[each.stage])
                if each.stage in plan.duration
                else None,
            }
            for each in plan.samples
        ],
        "advice": plan.advice,
        "unchecked": UNCHECKED,
    }


def write_json(plan: Forecast, path: Path) -> None:
    """Write `as_dict`, complete or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(as_dict(plan), indent=1) + "\n", encoding="utf-8")


UNCHECKED = [
    "States are held against measured storages of two CPU ranks (test_memory.py); no figure was checked on a GPU.",
    "Activations are held against autograd's on a CPU; on a GPU dropout keeps 1 byte an element, and attention's own "
    "workspaces, the decoding of a validation and NCCL's buffers are left to the reserve.",
    "Times count matrix products and attention of real tokens alone: no padding, no communication, no waiting for data.",
]


def render(plan: Forecast) -> RenderableType:
    """A table, the stages, and the advice."""
    parts: list[RenderableType] = [
        _head(plan),
        _table(plan),
        *map(_stage_line, plan.samples, [plan] * len(plan.samples)),
    ]
    parts += [Text(f"-> {line}", style="bold") for line in plan.advice]
    parts += [Text(f"unchecked: {line}", style="dim") for line in UNCHECKED]
    return Group(*parts)


def _head(plan: Forecast) -> Text:
    sizes, words = (
        plan.sizes,
        "" if plan.catalogue.words else f"; {ASSUMED_ITEM_TOKENS} sub-words a word assumed",
    )
    return Text(
        f"{sizes.parameters:,} parameters, {sizes.ids:,} of them in id tables; {plan.catalogue.users:,} users, "
        f"{plan.catalogue.items:,} items ({plan.catalogue.source}{words}); {plan.recipe.precision}, "
        f"{plan.gpus} GPU of {plan.memory_gib:g} GiB, {RESERVE_GIB} of them kept free"
    )


def _table(plan: Forecast) -> Table:
    table = Table(
        title=f"GiB a GPU; micro_batch_tokens {plan.recipe.micro_batch_tokens:,}",
        title_justify="left",
    )
    for name in (
        "method",
        "weights",
        "optimiser",
        "gradients",
        "ids",
        "buffers",
        "state",
        "peak",
        "fits",
        "largest",
        "host",
    ):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for fit in plan.fits:
        state = fit.state
        optimiser = state.masters + state.moments + state.average
        sizes = (
            state.weights,
            optimiser,
            state.gradients,
            state.id_rows,
            state.buffers,
            state.total,
            fit.peak,
        )
        fits = fit.fits(plan.limit)
        table.add_row(
            _NAMES[fit.method],
            *(f"{size / GIB:.2f}" for size in sizes),
            "yes" if fits else "no",
            f"{fit.largest:,}" if fit.largest else "none",
            f"{state.host / GIB:.2f}",
            style="" if fits else "red",
        )
    return table


def _stage_line(samples: Samples, plan: Forecast) -> Text:
    text = (
        f"{samples.stage}: {samples.epoch_samples:,} samples an epoch, {samples.lengths.mean():.0f} encoder tokens on average, "
        f"{samples.lengths[-1]:,} at most; {plan.step_flops[samples.stage] / 1e12:.2f} TFLOP a step of {samples.batch_size:,}"
    )
    if samples.stage in plan.duration:
        took = plan.duration[samples.stage]
        text += f"; {_time(took.epoch_seconds)} an epoch, {_time(took.total_seconds)} in all ({took.assumption})"
    return Text(text)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
