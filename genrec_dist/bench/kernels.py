"""The embedding kernel beside eager torch, torch.compile and atomics, on ids as Beauty has them;
its share of a training step."""

# n places, D width, R rows of a table

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_kernels import (
    EmbeddingTables,
    GradientOrder,
    Rows,
    embedding_sum,
    make_gradient_order,
    wants_gradient_order,
)
from genrec_kernels.sharded_rows import RowTable, distinct_rows
from genrec_shards.dataset import load_dataset
from genrec_shards.storage.write import write_shards
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.bench.beam_fixture import (
    MOST_TOKENS,
    PAD,
    VOCABULARY,
    Users,
    make_users,
    make_words,
    users_of,
)
from genrec_dist.bench.id_tables import draw_ids
from genrec_dist.bench.measure import Claim, in_turn, median, table
from genrec_dist.bench.stream import make_data
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.data.encoder_input import Layout, encode_histories, ragged
from genrec_dist.model.genrec import POSITION_OFFSET
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import stage_of

OURS, EAGER, COMPILED, CLONE = "ours", "eager", "torch.compile", "clone() of the same bytes"
GROWTH, STEPS = "growth", "steps"
ATOMICS, ATOMICS_FP32 = "atomics", "atomics in float32"
RATE = 0.05
BASE_SHAPE = (
    "model.d_model=768", "model.encoder_layers=6", "model.decoder_layers=6", "model.heads=12", "model.ffn=3072",
    "model.dropout=0.1", "model.embedding_dropout=0", "model.max_tokens=512", "model.user_ids=true",
    "model.positions=from-start", "tokens.vocab_size=50265",
)  # fmt: skip
"""BART-base's shape and the paper's input; the vocabulary is what a tokenizer trained on the codes
has."""


@dataclass(frozen=True)
class Shape:
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"d={self.width} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class StepShape:
    """A training step that the sum is set beside."""

    name: str
    overrides: tuple[str, ...]
    """Of the recipe `tiny`."""


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _steps() -> tuple[StepShape, ...]:
    if not _on_gpu():
        return (StepShape("tiny", ()),)
    larger = ("micro_batch_tokens=16384", "finetune.batch_size=2048")
    base = ("micro_batch_tokens=16384", "finetune.batch_size=256", *BASE_SHAPE)
    return StepShape("tiny, 2,048 samples", larger), StepShape("BART-base 6+6, 256 samples", base)


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    tokens: tuple[int, ...] = field(
        default_factory=lambda: (16_384, 131_072) if _on_gpu() else (16_384,)
    )
    shapes: tuple[Shape, ...] = field(
        default_factory=lambda: (
            Shape(768, torch.bfloat16 if _on_gpu() else torch.float32),
            Shape(128, torch.float32),
        )
    )
    users: int = 22_363
    """Of the synthetic histories that stand in where no data is given: those of Beauty."""
    items: int = 12_101
    vocabulary: int = VOCABULARY
    repeats: int = field(default_factory=lambda: 30 if _on_gpu() else 15)
    fewest_sets: int = 3
    """Of ids, tables and gradients that take turns; more where fewer would fit into the GPU's
    cache."""
    growth: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Rows of the id tables outside autograd whose steps are compared."""
    growth_dim: int = 64
    growth_tokens: int = 16_384
    growth_rows: int = 4_096
    """Distinct rows of a step."""
    steps: tuple[StepShape, ...] = field(default_factory=_steps)
    step_repeats: int = field(default_factory=lambda: 20 if _on_gpu() else 7)
    seconds: float = math.inf
    """What would begin later than this is left out, and the table says so."""


def bench_kernels(
    data: Path | None = None, sizes: Sizes | None = None
) -> tuple[list[Claim], dict[str, Any]]:
    """All of it, on the GPU if there is one, else on one thread of the CPU. `data`: a directory of
    `genrec prepare`, or None for synthetic histories.

    Raises AssertionError if ours is further from float64's sums than eager torch is.
    """
    sizes = sizes or Sizes()
    device = torch.device("cuda" if _on_gpu() else "cpu")
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        users = _users(data, sizes)
        parts: dict[str, Callable[[], Measured]] = {}
        for number, tokens in enumerate(sizes.tokens):
            for shape in sizes.shapes:
                for norm in (False,) if number else (False, True):
                    parts[_name(shape, tokens, norm)] = partial(
                        measure_sum, users, shape, tokens, norm, sizes, device
                    )
            if not number:
                parts[GROWTH] = partial(measure_growth, sizes, device)
                parts[STEPS] = partial(measure_steps, data, sizes, device)
        found, left_out = _measure(parts, sizes.seconds)
    finally:
        torch.set_num_threads(threads)
    claims = [claim for claims, _ in found.values() for claim in claims]
    measured = {name: more for name, (_, more) in found.items()}
    more = {
        "data": {"source": data.name if data else "synthetic", "users": len(users.offsets) - 1},
        "growth": measured.pop(GROWTH, {}),
        "steps": measured.pop(STEPS, {}),
        "sums": measured,
        "left out": left_out,
        "repeats": sizes.repeats,
    }
    return claims, table("kernels", claims, **more)


Measured = tuple[list[Claim], dict[str, Any]]


def _measure(
    parts: Mapping[str, Callable[[], Measured]], seconds: float
) -> tuple[dict[str, Measured], list[str]]:
    """(what was measured, the names of what would have begun too late)."""
    found: dict[str, Measured] = {}
    end = time.monotonic() + seconds
    for name, part in parts.items():
        if time.monotonic() < end:
            found[name] = part()
    return found, [name for name in parts if name not in found]


def _name(shape: Shape, tokens: int, norm: bool) -> str:
    return f"{shape.name}, {tokens:,} tokens{', layer norm' if norm else ''}"


def _users(data: Path | None, sizes: Sizes) -> Users:
    if data is None:
        return make_users(sizes.users, sizes.items)
    sequences = load_dataset(data).sequences
    return users_of(sequences, sequences.num_items)


# What is summed.


def draw_places(users: Users, num_places: int, seed: int) -> list[Tensor]:
    """Token ids, rows of positions, user rows and item rows, int64 [n] each: test histories of
    users drawn at random, spelled as BART's tokenizer spells Beauty's words, one behind the other
    without padding."""
    num_users, num_items = len(users.offsets) - 1, int(users.items.max()) + 1
    words = make_words(num_items, num_users)
    layout = Layout(words, PAD, max_tokens=MOST_TOKENS, user_ids=True, positions="from-start")
    dice = np.random.default_rng(seed)
    parts: list[list[Tensor]] = []
    drawn = 0
    while drawn < num_places:
        rows_B = dice.integers(0, num_users, max(1, (num_places - drawn) // 32))
        lengths_B = np.diff(users.offsets)[rows_B]
        flat, offsets = ragged(users.offsets[rows_B], lengths_B)
        encoder = encode_histories(users.items[flat], offsets, rows_B, layout)
        real = encoder.attention_mask
        positions = encoder.position_ids + POSITION_OFFSET
        parts.append(
            [
                rows[real]
                for rows in (encoder.input_ids, positions, encoder.user_rows, encoder.item_rows)
            ]
        )
        drawn += int(real.sum())
    return [torch.cat(rows)[:num_places] for rows in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Case:
    """One set of inputs on its device."""

    ids: list[Tensor]
    """Rows of token, position, user and item tables, int64 [n]."""
    tables: list[Tensor]
    norm: list[Tensor]
    """Weight and bias of the layer norm, or nothing."""
    gradient: Tensor
    plan: GradientOrder | None
    plan_seconds: float
    """What the data worker takes for the plan."""

    @property
    def learned(self) -> list[Tensor]:
        return [*self.tables, *self.norm]


def make_case(
    ids: list[Tensor],
    rows: Sequence[int],
    shape: Shape,
    norm: bool,
    device: torch.device,
    seed: int,
) -> Case:
    """Tables of `rows` rows and a gradient, drawn on the device; the plan is made as a data worker
    makes it."""
    dice = torch.Generator(device).manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice, device=device).to(shape.dtype)

    start = time.perf_counter()
    names, silent = ("token", "position", "user", "item"), (PAD, None, 0, 0)
    plan = make_gradient_order(
        [
            Rows(name, one.numpy(), size, row)
            for name, one, size, row in zip(names, ids, rows, silent, strict=True)
        ]
    )
    plan_seconds = time.perf_counter() - start
    tables = [drawn(size, shape.width).mul_(0.02) for size in rows]
    tables[2][0] = tables[3][0] = 0
    learned = [1 + 0.1 * drawn(shape.width), 0.1 * drawn(shape.width)] if norm else []
    return Case(
        [one.to(device) for one in ids],
        [one.requires_grad_() for one in tables],
        [one.requires_grad_() for one in learned],
        drawn(len(ids[0]), shape.width),
        plan.to(device) if wants_gradient_order(device.type) else None,
        plan_seconds,
    )


def make_cases(
    users: Users, shape: Shape, tokens: int, norm: bool, sizes: Sizes, device: torch.device
) -> list[Case]:
    """Sets that take turns, so that none finds itself in the cache of a GPU: together at least
    twice that."""
    rows = (
        sizes.vocabulary,
        MOST_TOKENS + POSITION_OFFSET,
        len(users.offsets),
        int(users.items.max()) + 2,
    )
    count = sizes.fewest_sets
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(count, min(24, 1 + 2 * cache // (tokens * shape.width * shape.dtype.itemsize)))
    return [
        make_case(draw_places(users, tokens, seed), rows, shape, norm, device, seed)
        for seed in range(count)
    ]


# The rivals. Each takes a case and gives the sum; the positions are rows of their table already.


def ours(case: Case) -> Tensor:
    weight, bias = case.norm or (None, None)
    token, position, user, item = case.tables
    tables = EmbeddingTables(
        token, position, user, item, pad_token_id=PAD, norm_weight=weight, norm_bias=bias
    )
    tokens, positions, users, items = case.ids
    return embedding_sum(tokens, positions, users, items, tables, order=case.plan)


def plain(ids: list[Tensor], tables: list[Tensor], norm: list[Tensor]) -> Tensor:
    """As anybody writes it: what eager torch runs and torch.compile is given."""
    summed = F.embedding(ids[0], tables[0], padding_idx=PAD) + F.embedding(ids[1], tables[1])
    summed = (
        summed
        + F.embedding(ids[2], tables[2], padding_idx=0)
        + F.embedding(ids[3], tables[3], padding_idx=0)
    )
    return _normed(summed, norm)


def _normed(summed: Tensor, norm: list[Tensor]) -> Tensor:
    return F.layer_norm(summed, summed.shape[-1:], norm[0], norm[1]) if norm else summed


def by_atomics(case: Case, sums: torch.dtype | None = None) -> Tensor:
    from genrec_dist.bench.kernel_peers import atomics

    return _normed(atomics(case.ids, case.tables, PAD, sums), case.norm)


Rival = Callable[[Case], Tensor]


def make_rivals(shape: Shape, device: torch.device) -> dict[str, Rival]:
    # Each shape is compiled for itself: left alone, the second would be compiled for any size.
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)
    rivals: dict[str, Rival] = {
        OURS: ours,
        EAGER: lambda case: plain(case.ids, case.tables, case.norm),
        COMPILED: lambda case: compiled(case.ids, case.tables, case.norm),
    }
    if device.type == "cuda":
        rivals[ATOMICS] = by_atomics
        if shape.dtype != torch.float32:
            rivals[ATOMICS_FP32] = partial(by_atomics, sums=torch.float32)
    return rivals


def forward_alone(rival: Rival, case: Case) -> object:
    with torch.no_grad():
        return rival(case)


def forward_and_backward(rival: Rival, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(rival(case), case.learned, case.gradient)


# Measuring the sum.


def measure_sum(
    users: Users, shape: Shape, tokens: int, norm: bool, sizes: Sizes, device: torch.device
) -> tuple[list[Claim], dict[str, Any]]:
    """Forward alone, and forward and backward, of all rivals in turn on the same sets."""
    cases = make_cases(users, shape, tokens, norm, sizes, device)
    rivals = make_rivals(shape, device)
    errors = check_errors(rivals, cases[0])
    moved = bytes_moved(cases[0])
    seconds: dict[str, dict[str, list[float]]] = {}
    host: dict[str, dict[str, float]] = {}
    for what, run in (("forward", forward_alone), ("forward and backward", forward_and_backward)):
        runs: dict[str, Callable[[], object]] = {
            name: _each_in_turn(partial(run, rival), cases) for name, rival in rivals.items()
        }
        rooms = [torch.empty(moved[what] // 2, dtype=torch.uint8, device=device) for _ in cases]
        runs[CLONE] = _each_in_turn(torch.clone, rooms)
        seconds[what], host[what] = timed(runs, sizes.repeats, device)
    name = _name(shape, tokens, norm)
    medians = {
        what: {rival: median(values) for rival, values in each.items()}
        for what, each in seconds.items()
    }
    more = {
        "sets": len(cases),
        "seconds": seconds,
        "host seconds a call": host,
        "bytes read and written": moved,
        "share of clone's bandwidth": {
            what: {rival: each[CLONE] / value for rival, value in each.items()}
            for what, each in medians.items()
        },
        "largest error beside float64": errors,
        "seconds of the plan, in the data worker": cases[0].plan_seconds,
        "commonest rows": commonest(cases[0].ids),
    }
    return (_claims_on_gpu if device.type == "cuda" else _claims_on_cpu)(name, medians), more


def _claims_on_gpu(name: str, medians: dict[str, dict[str, float]]) -> list[Claim]:
    forward, both = medians["forward"], medians["forward and backward"]
    claims = [
        _speed(f"forward, {name}", CLONE, forward, 0.8),
        _speed(f"forward, {name}", COMPILED, forward, round(1 / 1.05, 4), "<= 1.05x its time"),
        _speed(f"forward+backward, {name}", COMPILED, both, 1.5),
        _speed(f"forward+backward, {name}", EAGER, both, 3),
    ]
    return claims + [
        _speed(f"forward+backward, {name}", peer, both, 1)
        for peer in (ATOMICS, ATOMICS_FP32)
        if peer in both
    ]


def _claims_on_cpu(name: str, medians: dict[str, dict[str, float]]) -> list[Claim]:
    both = medians["forward and backward"]
    return [_speed(f"forward+backward, {name}", peer, both, 1) for peer in (COMPILED, EAGER)]


def _speed(
    name: str, peer: str, seconds: Mapping[str, float], least: float, goal: str | None = None
) -> Claim:
    mine, theirs = seconds[OURS], seconds[peer]
    return Claim(
        id=name, peer=peer, ours=1e3 * mine, theirs=1e3 * theirs, unit="ms",
        ratio=theirs / mine, goal=goal or f">= {least:g}x", holds=theirs >= least * mine,
    )  # fmt: skip


def bytes_moved(case: Case) -> dict[str, int]:
    """What has to be read and written at least, each place's rows counted anew: ids, rows and the
    sum; then the gradient once for each table that learns of a place, and the tables' gradients."""
    width, size = case.gradient.shape[1], case.gradient.element_size()
    num_places = len(case.ids[0])
    learning = [int((ids != row).sum()) for ids, row in zip(case.ids, (PAD, -1, 0, 0), strict=True)]
    read = 2 * num_places + sum(int((ids != 0).sum()) for ids in case.ids[2:])
    forward = 4 * 8 * num_places + (read + num_places) * width * size
    backward = (sum(learning) + sum(len(one) for one in case.tables)) * width * size
    return {"forward": forward, "forward and backward": forward + backward}


def commonest(ids: Sequence[Tensor]) -> dict[str, float]:
    """The share of all places that the most frequent row of each table has, row 0 of the id tables
    left out."""
    shares = {}
    for name, rows, first in zip(
        ("token", "position", "user", "item"), ids, (0, 0, 1, 1), strict=True
    ):
        shares[name] = float(
            rows.bincount()[first:].amax().item() if int(rows.max()) >= first else 0
        ) / len(rows)
    return shares


def check_errors(rivals: Mapping[str, Rival], case: Case) -> dict[str, dict[str, float]]:
    """Largest error of the sum and of any gradient, over the largest true value of it. Raises
    AssertionError if ours is further from float64 than eager torch, but for a rounding of its
    own."""
    exact = Case(
        case.ids,
        [one.detach().double().requires_grad_() for one in case.tables],
        [one.detach().double().requires_grad_() for one in case.norm],
        case.gradient.double(), None, 0.0,
    )  # fmt: skip
    truth = _results(lambda one: plain(one.ids, one.tables, one.norm), exact)
    found = {
        name: [_error(*pair) for pair in zip(_results(rival, case), truth, strict=True)]
        for name, rival in rivals.items()
    }
    room = torch.finfo(case.gradient.dtype).eps
    for mine, theirs in zip(found[OURS], found[EAGER], strict=True):
        assert mine <= theirs + room, (
            f"ours is {mine:.2g} from float64's result, eager torch {theirs:.2g}"
        )
    return {
        name: {"sum": values[0], "gradients": max(values[1:])} for name, values in found.items()
    }


def _results(rival: Rival, case: Case) -> list[Tensor]:
    summed = rival(case)
    return [summed.detach(), *torch.autograd.grad(summed, case.learned, case.gradient)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _each_in_turn(run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], object]:
    """A call with the next of the inputs each time."""
    number = -1

    def step() -> object:
        nonlocal number
        number = (number + 1) % len(inputs)
        return run(inputs[number])

    return step


# The clock.


def timed(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run, median seconds until the call returns on the host), the runs in turn
    behind a round to warm up.

    On a GPU by CUDA events, and the device is kept busy meanwhile, so that it never waits for the
    host's launches: what counts in a training step, where the host runs ahead."""
    if device.type == "cpu":
        return in_turn(runs, repeats), {}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, list[float]] = {name: [] for name in runs}
    cycles = 2 * _cycles_a_second(device) * max(_host_seconds(run) for run in runs.values())
    for _ in range(repeats):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(cycles))
            begin.record()
            start = time.perf_counter()
            result = run()
            calls[name].append(time.perf_counter() - start)
            end.record()
            end.synchronize()
            del result
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds, {name: median(values) for name, values in calls.items()}


def _host_seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def _cycles_a_second(device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    torch.cuda.synchronize(device)
    return 10_000_000 / (begin.elapsed_time(end) / 1e3)


# As the id table grows.


class GrownStep:
    """The id part of a training step with its table outside autograd: fetch, sum, backward,
    update."""

    def __init__(self, num_rows: int, sizes: Sizes, device: torch.device):
        self.table = RowTable(num_rows, sizes.growth_dim, init_std=0.02, key=1, device=device)
        dice = torch.Generator().manual_seed(2)
        words = 1000
        self.tokens, self.positions = (
            torch.randn(rows, sizes.growth_dim, generator=dice).to(device)
            for rows in (words, MOST_TOKENS)
        )
        self.gradient = torch.randn(sizes.growth_tokens, sizes.growth_dim, generator=dice).to(
            device
        )
        count = sizes.growth_tokens
        self.batches = []
        for seed in range(2 * sizes.fewest_sets):
            ids = draw_ids("zipf", num_rows, min(sizes.growth_rows, num_rows), seed)
            # A draw has more or fewer ids than there are places: its distinct rows come first, then
            # repeats.
            ids = np.random.default_rng(seed).permutation(
                np.resize(np.concatenate([np.unique(ids), ids]), count)
            )
            rows, (places,) = distinct_rows([ids], num_rows)
            tokens, positions = np.arange(count) * 7 % words, np.arange(count) % MOST_TOKENS
            plan = make_gradient_order(
                [
                    Rows("token", tokens, words),
                    Rows("position", positions, MOST_TOKENS),
                    None,
                    Rows("item", places, len(rows) + 1, 0),
                ]
            )
            arrays = (tokens, positions, np.zeros_like(tokens), places)
            inputs = [torch.from_numpy(one).to(device) for one in arrays]
            self.batches.append((rows, inputs, plan.to(device)))

    def __call__(self, batch: tuple[Tensor, list[Tensor], GradientOrder]) -> None:
        rows_u, (tokens, positions, users, items), plan = batch
        leaf = self.table.fetch(rows_u, zero_row=True).requires_grad_()
        tables = EmbeddingTables(self.tokens, self.positions, None, leaf)
        summed = embedding_sum(tokens, positions, users, items, tables, order=plan)
        (gradient,) = torch.autograd.grad(summed, leaf, self.gradient)
        self.table.update(gradient[1:], learning_rate=RATE)


def measure_growth(sizes: Sizes, device: torch.device) -> tuple[list[Claim], dict[str, Any]]:
    steps = {str(rows): GrownStep(rows, sizes, device) for rows in sizes.growth}
    runs = {name: _each_in_turn(step, step.batches) for name, step in steps.items()}
    seconds, _ = timed(runs, 2 * sizes.repeats, device)
    first, last = (median(seconds[str(rows)]) for rows in (sizes.growth[0], sizes.growth[-1]))
    claim = Claim(
        id=f"id part of a step, {sizes.growth[-1]:.0e} rows", peer=f"the same, {sizes.growth[0]:.0e} rows",
        ours=1e3 * last, theirs=1e3 * first, unit="ms",
        ratio=last / first, goal="<= 1.2x", holds=last <= 1.2 * first,
    )  # fmt: skip
    return [claim], {
        "seconds": seconds, "dim": sizes.growth_dim, "tokens": sizes.growth_tokens, "distinct rows": sizes.growth_rows,
    }  # fmt: skip


# Beside a training step.


def measure_steps(data: Path | None, sizes: Sizes, device: torch.device) -> Measured:
    """Training steps by what `genrec train` runs, with the kernel and without where there is one,
    and what the sum and its gradients take of them on the steps' own ids."""
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        folder = Path(name)
        prepared = data or folder / "made" / "data"
        if data is None and sizes.steps:
            make_data(folder / "made", sizes.users, sizes.items)
        if sizes.steps:
            write_shards(load_dataset(prepared), folder / "shards")
        found = {}
        for number, shape in enumerate(sizes.steps):
            where = (
                f"data={prepared}",
                f"shards={folder / 'shards'}",
                f"run={folder / str(number)}",
                "workers=0",
            )
            found[shape.name] = measure_step(
                load_recipe("tiny", [*where, *shape.overrides]), sizes, device
            )
        return [], found


def measure_step(recipe: Recipe, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    setup, model = build_setup(recipe)
    loop = Loop(setup, model, make_accelerator(recipe))
    # Seen once, used again: making a batch is not the device's work.
    with contextlib.closing(loop.batches()) as batches:  # type: ignore[type-var]
        shares = list(islice(batches, sizes.step_repeats + 1))
    ways = ("triton", "reference") if device.type == "cuda" else ("reference",)
    runs = {way: _each_in_turn(partial(_take_step, loop, way, device), shares) for way in ways}
    seconds = in_turn(runs, sizes.step_repeats)
    config = model.config
    rows = [
        config.vocab_size,
        config.max_position_embeddings + POSITION_OFFSET,
        config.num_users + 1,
        config.num_items + 1,
    ]
    shape = Shape(config.d_model, next(model.parameters()).dtype)
    batch = max(
        (batch for _, share in shares for batch in share.micro_batches),
        key=lambda one: one.num_tokens,
    )
    encoder = batch.encoder
    ids = [
        encoder.input_ids,
        encoder.position_ids + POSITION_OFFSET,
        encoder.user_rows,
        encoder.item_rows,
    ]
    case = make_case([one.reshape(-1) for one in ids], rows, shape, True, device, 0)
    both = {
        name: partial(forward_and_backward, rival, case) for name, rival in make_rivals(shape, device).items()
        if name in (OURS, EAGER)
    }  # fmt: skip
    sums, _ = timed(both, sizes.repeats, device)
    # The largest micro-batch stands for all: by its share of the steps' encoder slots.
    slots = [
        sum(one.encoder.input_ids.numel() for one in share.micro_batches) for _, share in shares
    ]
    scale = float(np.mean(slots)) / encoder.input_ids.numel()
    step = median(seconds[ways[0]])
    return {
        "seconds of a step": seconds,
        "tokens of a step": float(
            np.mean([sum(one.num_tokens for one in share.micro_batches) for _, share in shares])
        ),
        "vocabulary": config.vocab_size,
        "parameters": loop.num_parameters,
        "precision": recipe.precision,
        "seconds of the sum, forward and backward, a step": {
            name: scale * median(each) for name, each in sums.items()
        },
        "share of a step": {name: scale * median(each) / step for name, each in sums.items()},
    }


def _take_step(loop: Loop, way: str, device: torch.device, numbered: tuple[int, RankStep]) -> None:
    before = os.environ.get("GENREC_KERNELS")
    os.environ["GENREC_KERNELS"] = way
    try:
        step, share = numbered
        here = stage_of(loop.setup.stages, step)
        loop.take_step(step, share, loop.step_totals(share), here.stage, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        del os.environ["GENREC_KERNELS"]
        if before is not None:
            os.environ["GENREC_KERNELS"] = before


def format_shares(table: Mapping[str, Any]) -> str:
    """Bandwidth, and what the sum is of a training step: plain lines."""
    lines = []
    for name, measured in table["sums"].items():
        for what, shares in measured["share of clone's bandwidth"].items():
            told = ", ".join(
                f"{rival} {share:.0%}" for rival, share in shares.items() if rival != CLONE
            )
            lines.append(f"{what}, {name}: of clone()'s bandwidth {told}")
    for name, step in table["steps"].items():
        told = ", ".join(f"{rival} {share:.2%}" for rival, share in step["share of a step"].items())
        lines.append(f"sum and its gradients in a step of {name}: {told}")
    return "\n".join(lines)
