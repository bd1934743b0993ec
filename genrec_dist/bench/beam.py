"""Decoding beside Hugging Face's `generate`, the trie's cost, and evaluating beside an epoch."""

# B users, K beams, N list

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import load_dataset

from genrec_dist.bench.measure import (
    REPEATS,
    Claim,
    Measured,
    OnPart,
    format_columns,
    in_turn,
    make_claim,
    read_events,
    table,
    tell_nobody,
    watch_training,
)
from genrec_dist.bench.peers.beam import GENERATE, compare_lists, generated_lists, make_generate
from genrec_dist.bench.synthetic import (
    BEAUTY_ITEMS,
    BEAUTY_USERS,
    BOS,
    EOS,
    MASK,
    MAX_TOKENS,
    PAD,
    VOCABULARY,
    Histories,
    open_data,
    spell,
)
from genrec_dist.config.recipe import Model
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie, hash_of_words, load_trie, save_trie
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration

MOST_OF_GENERATE = 128
"""Largest batch that `generate` decodes too: each step it asks Python about every beam, which takes
seconds at larger ones, and its scores of all steps do not fit into a card of 24 GiB."""


@dataclass(frozen=True)
class Shape:
    """A model that is decoded with, and for how many users at once."""

    name: str
    d_model: int
    layers: int
    """Of the encoder and of the decoder."""
    heads: int
    ffn: int
    batches: tuple[int, ...]
    headline: int
    """The batch whose ratios are claimed."""
    exact_goal: float
    compact_goal: float | None


ON_CPU = (
    Shape("d128 2+2", 128, 2, 4, 512, (1, 8, 32, 128), 32, 10, 80),
    Shape("BART-base 6+6", 768, 6, 12, 3072, (1, 4, 12), 12, 5, 6),
)
ON_GPU = (
    Shape("d128 2+2", 128, 2, 4, 512, (1, 32, 128, 512), 32, 30, None),
    Shape("BART-base 6+6", 768, 6, 12, 3072, (1, 32, 128), 32, 30, None),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    shapes: tuple[Shape, ...] = field(
        default_factory=lambda: ON_GPU if torch.cuda.is_available() else ON_CPU
    )
    items: int = BEAUTY_ITEMS
    users: int = BEAUTY_USERS
    """Of the synthetic histories that are used where no data is given."""
    beam: int = 20
    repeats: int = REPEATS
    """Of each rival at the headline batches; `generate` runs once at the others."""
    trie_items: int = 1_000_000
    watched_steps: int = 40
    """Of the training that evaluating is compared with."""
    repeats_of_evaluating: int = 3


TINY = Sizes(
    shapes=(Shape("tiny", 32, 2, 2, 64, (1, 3), 3, exact_goal=1, compact_goal=2),),
    items=1500,
    users=80,
    beam=6,
    repeats=2,
    trie_items=3000,
)


def bench_beam(
    data: Path | None = None,
    run: Path | None = None,
    sizes: Sizes | None = None,
    on_part: OnPart = tell_nobody,
) -> Measured:
    """The claims and the table of `genrec bench beam`.

    Args:
        data: a directory of `genrec prepare` whose histories are decoded; None: synthetic ones.
        run: a run trained on `data`: also measure what evaluating takes beside an epoch.
        sizes: what is measured.
        on_part: told each batch.

    Raises:
        AssertionError: if `generate` and the exact search give different lists.
    """
    if run is not None and data is None:
        raise ValueError("--run: give --data too, the directory the run was trained on")
    sizes = sizes or Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, described = open_data(data, sizes.users, sizes.items)
    claims: list[Claim] = []
    shapes: dict[str, Any] = {}
    for shape in sizes.shapes:
        found, shapes[shape.name] = measure_shape(
            World(shape, dataset.sequences, device), sizes, on_part
        )
        claims += found
    found, trie = measure_trie(sizes.trie_items)
    claims += found
    evaluating: dict[str, Any] = {}
    if run is not None and data is not None:
        found, evaluating = evaluate_share(run, data, sizes)
        claims += found
    plain_sizes = {**vars(sizes), "shapes": [vars(shape) for shape in sizes.shapes]}
    more = {"data": described, "shapes": shapes, "trie": trie, "evaluating": evaluating}
    return claims, table("beam", claims, sizes=plain_sizes, **more)


class World:
    """A model with random weights, a catalogue of words of four sub-words, and users."""

    def __init__(self, shape: Shape, sequences: Any, device: torch.device):
        self.shape, self.device = shape, device
        self.histories = Histories.of(sequences)
        self.words = self.histories.layout.words
        self.model = make_model(shape, self.words).to(device)
        trie = build_trie(*self.words.tokens_of_items())
        self.searcher = TrieSearcher(self.model, trie, device)

    def batch(self, size: int) -> EncoderInput:
        return self.histories.encode(self.histories.typical_users(size)).to(self.device)


def make_model(shape: Shape, words: WordTable) -> GenRecForConditionalGeneration:
    torch.manual_seed(0)
    recipe = Model(
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        heads=shape.heads,
        ffn=shape.ffn,
        max_tokens=MAX_TOKENS,
        # Wide enough that users get different lists.
        init_std=0.6 / shape.d_model**0.5,
    )
    sizes = ModelSizes(
        vocab_size=VOCABULARY,
        num_users=words.num_users,
        num_items=words.num_items,
        num_masks=1,
        special={"bos": BOS, "pad": PAD, "eos": EOS, "mask": MASK},
    )
    model: GenRecForConditionalGeneration = build_model(recipe, sizes).eval()
    return model


# Measuring a shape.


def measure_shape(world: World, sizes: Sizes, on_part: OnPart) -> Measured:
    """Users per second of all rivals at each batch; their lists are compared first."""
    shape, curve = world.shape, {}
    for size in shape.batches:
        curve[str(size)] = measure_batch(world, size, sizes)
        on_part(f"{shape.name}, batch {size}", curve[str(size)])
    seconds = curve[str(shape.headline)]["seconds"]
    theirs = median(seconds[GENERATE])
    claims = [
        make_claim(
            f"{mode}, {shape.name}, batch {shape.headline}",
            GENERATE,
            median(seconds[mode]),
            theirs,
            "s a batch",
            f">= {goal:g}x",
        )
        for mode, goal in (("exact", shape.exact_goal), ("compact", shape.compact_goal))
        if goal is not None
    ]
    if world.device.type == "cuda":
        rates = [point["users a second"] for point in curve.values()]
        ours, theirs = (
            max(rate[name] for rate in rates if name in rate) for name in ("exact", GENERATE)
        )
        id = f"exact, {shape.name}, each at its best batch"
        claims.append(make_claim(id, GENERATE, ours, theirs, "users/s", ">= 5x"))
    return claims, {
        "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        "trie nodes": world.searcher.trie.num_nodes,
        "batches": curve,
    }


def measure_batch(world: World, size: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds of each rival at one batch, after a run whose lists are compared; of `generate` up to
    `MOST_OF_GENERATE` users."""
    encoder = world.batch(size)
    search = partial(world.searcher.search, encoder, beam=sizes.beam, top=sizes.beam)
    generate = make_generate(world.model, world.words, encoder, sizes.beam)
    ours, _ = search(), search(mode="compact")
    compared = {}
    if size <= MOST_OF_GENERATE:
        theirs = generated_lists(generate(True), world.model, world.words, size)
        compared = compare_lists(ours, theirs)

    def finished(run: Callable[[], object]) -> None:
        run()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    modes = {name: partial(finished, partial(search, mode=name)) for name in ("exact", "compact")}
    peers = {GENERATE: partial(finished, generate)} if size <= MOST_OF_GENERATE else {}
    if size == world.shape.headline:
        seconds = in_turn(modes | peers, sizes.repeats, warm_up=False)
    else:
        seconds = in_turn(modes, sizes.repeats, False) | in_turn(peers, 1, False)
    return {
        "seconds": seconds,
        "users a second": {name: size / median(values) for name, values in seconds.items()},
        "padded to": encoder.input_ids.shape[1],
        "lists compared with exact": compared,
    }


def measure_trie(num_items: int) -> Measured:
    """Building, saving and loading a trie of random codes of up to 7 digits; medians of three."""
    dice = np.random.default_rng(0)
    codes = dice.permutation(10 * num_items)[:num_items]
    words = spell(codes, (0, 1), np.arange(2, 2002), num_groups=3)
    trie, words_hash = build_trie(*words), hash_of_words(*words)
    identity = {"numbering_hash": "0" * 64, "words_hash": words_hash}
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        path = Path(name) / "trie.safetensors"
        rivals: dict[str, Callable[[], object]] = {
            "build": partial(build_trie, *words),
            "save": partial(save_trie, trie, path, **identity),
            # As a run is loaded: the words are hashed to see whether the trie is theirs.
            "hash words and load": lambda: (hash_of_words(*words), load_trie(path, **identity)),
        }
        seconds = {name: median(values) for name, values in in_turn(rivals, 3).items()}
        file_bytes = path.stat().st_size
    id = f"trie of {num_items:,} items"
    claims = [make_claim(id, "30 s", seconds["build"], 30.0, "s to build", "<= 1x")]
    sizes = {"nodes": trie.num_nodes, "bytes": trie.num_bytes, "file bytes": file_bytes}
    return claims, {"items": num_items, **sizes, "seconds": seconds}


# Evaluating beside an epoch.


def evaluate_share(run: Path, data: Path, sizes: Sizes) -> Measured:
    """Decoding the whole test set beside an epoch of the same recipe's training, in turn.

    An epoch is the mean time of the watched steps times the steps of an epoch. Raises ValueError if
    the run has logged no finished epoch."""
    from genrec_dist.inference.evaluate import evaluate
    from genrec_dist.inference.load import best_device, load_run
    from genrec_dist.inference.rank_users import Decoding

    steps_per_epoch = steps_of_an_epoch(run / "events.jsonl")
    loaded, dataset = load_run(run, best_device()), load_dataset(data)
    decoding = Decoding(exclude_history=loaded.model.config.exclude_history)
    epochs, decodings, wholes = [], [], []
    for _ in range(sizes.repeats_of_evaluating):
        with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
            settings = {"data": data, "run": Path(name) / "run", "pretrain.epochs": 0}
            settings["finetune.epochs"] = 1000
            steps = watch_training(str(run / "recipe.yaml"), settings, sizes.watched_steps)
            epochs.append(steps_per_epoch * float(np.mean(np.diff([s["time"] for s in steps]))))
            start = time.perf_counter()
            metrics = evaluate(replace(loaded, path=Path(name)), dataset, "test", decoding=decoding)
            wholes.append(time.perf_counter() - start)
            assert metrics is not None
            decodings.append(float(metrics["seconds"]))
    ours, peer = median(decodings), "an epoch of its training"
    claim = make_claim(f"evaluating {run.name}", peer, ours, median(epochs), "s", "<= 0.1")
    return [claim], {
        "seconds of decoding": decodings,
        "seconds with baselines, intervals and files": wholes,
        "seconds an epoch": epochs,
        "users": dataset.sequences.num_users,
        "beam": decoding.beam,
        "batch": decoding.batch_size,
    }


def steps_of_an_epoch(events: Path) -> int:
    """Optimizer steps of the first finetuning epoch. Raises ValueError if it was not validated."""

    def finetuning(kind: str) -> list[int]:
        return [
            event["step"] for event in read_events(events, kind) if event["stage"] == "finetune"
        ]

    steps, validations = finetuning("step"), finetuning("validation")
    if not steps or not validations:
        text = "no finished epoch of finetuning in it: train for one epoch at least"
        raise ValueError(f"{events}: {text}")
    return validations[0] + 1 - steps[0]


def format_curves(table: dict[str, Any]) -> str:
    """Users per second by shape and batch, as a plain table."""
    rows: list[list[str]] = []
    for name, shape in table["shapes"].items():
        for size, point in shape["batches"].items():
            rates = point["users a second"]
            if not rows:
                rows.append(["users/s", "batch", *rates])
            shown = [f"{rates[rival]:,.4g}" if rival in rates else "-" for rival in rows[0][2:]]
            rows.append([name, size, *shown])
    return format_columns(rows)
