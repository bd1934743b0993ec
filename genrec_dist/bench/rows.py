"""Id tables that grow: a step at 10^5 to 10^7 rows, torch's optimizers beside it, bytes sent."""

# N table rows, D width of a row, T ids of a step, u distinct rows among them, B samples, L tokens

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from genrec_kernels.distinct_rows import distinct_rows, look_up
from genrec_kernels.sharded_rows import RowTable
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.bench.measure import (
    REPEATS,
    Measured,
    each_in_turn,
    in_turn,
    make_claim,
    table,
    torch_threads,
)
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Optimizer
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import choose_attention
from genrec_dist.model.network import FetchedRows
from genrec_dist.model.optimizer import build_optimizer

Draw = Literal["zipf", "uniform"]
DRAWS: tuple[Draw, ...] = ("zipf", "uniform")
RATE = 0.05
SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
VOCABULARY, LENGTH = 16_384, 40
SCATTER = 7_368_787
"""A prime: popularity rank r is table row r * SCATTER % N, so that popular rows are scattered."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    growth: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Rows of the tables whose steps are compared; the claim is the last over the first."""
    peers: int = 1_000_000
    """Rows of the table that is compared with the peers'."""
    dim: int = 64
    rows: int = 20_000
    """Distinct rows of a step."""
    steps: int = 10
    """Steps of one measurement; the dense peer takes a tenth."""
    samples: int = 512
    """Of a training step, 40 tokens each."""
    model_steps: int = 2
    """Training steps of one measurement."""
    repeats: int = REPEATS


def bench_rows(sizes: Sizes | None = None) -> Measured:
    """The claims and the table of `genrec bench rows`, measured on one thread."""
    sizes = sizes or Sizes()
    parts = {
        "growth": measure_growth,
        "peers": measure_peers,
        "wire": measure_wire,
    }
    with torch_threads(1):
        measured = {name: part(sizes) for name, part in parts.items()}
    claims = [claim for found, _ in measured.values() for claim in found]
    more = {name: found for name, (_, found) in measured.items()}
    return claims, table("rows", claims, sizes=vars(sizes), **more)


def draw_ids(draw: Draw, num_rows: int, distinct: int, seed: int) -> np.ndarray:
    """int64 [T], ids as in a batch (row + 1), exactly `distinct` different ones, in random order.
    `draw`: uniform: each id once. zipf: the popularity of rank r falls as 1 / r, drawn until so
    many different ones were seen."""
    dice = np.random.default_rng([seed, num_rows])
    if draw == "uniform":
        return dice.permutation(dice.choice(num_rows, distinct, replace=False)) + 1
    ranks = np.empty(0, np.int64)
    while True:
        more = np.exp(dice.random(distinct) * np.log(num_rows)).astype(np.int64)
        ranks = np.concatenate([ranks, more])
        _, first = np.unique(ranks, return_index=True)
        if len(first) >= distinct:
            return ranks[: np.sort(first)[distinct - 1] + 1] * SCATTER % num_rows + 1


def fill(ids: np.ndarray, size: int, seed: int) -> np.ndarray:
    """int64 [size], all distinct ids and then repeats as drawn, in random order."""
    filled = np.resize(np.concatenate([np.unique(ids), ids]), size)
    return np.random.default_rng(seed).permutation(filled)


# A step as the table grows.


class TrainingStep:
    """A step of `tiny` with its item table outside autograd, as `genrec train` takes it."""

    def __init__(self, sizes: Sizes):
        shape = replace(load_recipe("tiny").model, id_dim=sizes.dim)
        rows = ModelSizes(
            vocab_size=VOCABULARY,
            num_users=0,
            num_items=sizes.growth[-1],
            num_masks=1,
            special=SPECIAL,
            ids_outside=True,
        )
        torch.manual_seed(0)
        self.model = build_model(shape, rows)
        choose_attention(self.model, "bf16")
        assert isinstance(self.model.item_embedding, FetchedRows)
        self.fetched = self.model.item_embedding
        self.optimizer = build_optimizer(self.model, Optimizer())
        dice = torch.Generator().manual_seed(1)
        count = sizes.samples
        self.inputs = {
            "input_ids": torch.randint(5, VOCABULARY, (count, LENGTH), generator=dice),
            "encoder_row": torch.arange(count),
            "decoder_input_ids": torch.tensor([[SPECIAL["mask"], 5]]).expand(count, -1),
            "labels": torch.tensor([[5, SPECIAL["eos"]]]).expand(count, -1),
        }

    def __call__(self, table: RowTable, batch: tuple[Tensor, Tensor]) -> None:
        rows_u, places_BL = batch
        leaf = table.fetch(rows_u, zero_row=True).requires_grad_()
        self.fetched.weight = leaf
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(item_rows=places_BL, **self.inputs) / self.inputs["labels"].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert leaf.grad is not None
        table.update(leaf.grad[1:], learning_rate=RATE)


def measure_growth(sizes: Sizes) -> Measured:
    """Seconds of a training step, and of its id part alone (fetch and update), by table rows."""
    tables = {n: RowTable(n, sizes.dim, init_std=0.02, key=1) for n in sizes.growth}
    training_step = TrainingStep(sizes)
    peer = f"the same, {sizes.growth[0]:.0e} rows"
    claims, found = [], {}
    for draw in DRAWS:
        whole, alone = {}, {}
        for n, rows in tables.items():
            batches = [_batch(draw, n, sizes, seed) for seed in range(3 * sizes.model_steps)]
            whole[str(n)] = _steps(partial(training_step, rows), batches, sizes.model_steps)
            # More batches than one measurement takes, so that rows have left the cache again.
            drawn = [draw_ids(draw, n, sizes.rows, seed) for seed in range(3 * sizes.steps)]
            plans = [distinct_rows([ids], n)[0] for ids in drawn]
            alone[str(n)] = _steps(partial(id_step, rows), plans, sizes.steps)
        rivals = (("step", whole, sizes.model_steps), ("id-part", alone, sizes.steps))
        for what, runs, steps in rivals:
            times = in_turn(runs, sizes.repeats)
            seconds = {name: [taken / steps for taken in each] for name, each in times.items()}
            first, last = (1e3 * median(seconds[str(n)]) for n in (min(tables), max(tables)))
            name = f"{what}, {sizes.growth[-1]:.0e} rows, {draw}"
            claims.append(make_claim(name, peer, last, first, "ms", "<= 1.2x"))
            found[f"{what}, {draw}"] = seconds
    tokens = sizes.samples * LENGTH
    more = {"rows_a_step": sizes.rows, "tokens_a_training_step": tokens}
    return claims, {"seconds_a_step": found, **more}


def id_step(table: RowTable, rows_u: Tensor) -> None:
    # The rows are used as their own gradient: as large, as warm in the cache, and update() may use
    # them up.
    table.update(table.fetch(rows_u), learning_rate=RATE)


def _batch(draw: Draw, num_rows: int, sizes: Sizes, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct rows [u], and the places of a batch's tokens among them [B, L]."""
    ids = draw_ids(draw, num_rows, sizes.rows, seed)
    ids_BL = fill(ids, sizes.samples * LENGTH, seed).reshape(sizes.samples, LENGTH)
    rows_u, (places_BL,) = distinct_rows([ids_BL], num_rows)
    return rows_u, torch.from_numpy(places_BL)


def _steps(step: Callable[[Any], None], batches: Sequence[Any], count: int) -> Callable[[], None]:
    """A function that takes `count` steps, each with the next of the batches."""
    one = each_in_turn(step, batches)

    def run() -> None:
        for _ in range(count):
            one()

    return run


# Beside torch's own: lookup, backward and optimizer, for the same batches.


Backward = Callable[[Tensor], None]
Rival = Callable[[np.ndarray, Backward], None]
"""Looks the ids [T] up, calls the backward with their rows [T, D], and updates the table."""


def ours(start_ND: Tensor) -> Rival:
    """Fetch, lookup, backward, update; the plan of the rows included, though in a training a data
    worker makes it."""
    table = RowTable(len(start_ND), start_ND.shape[1], init_std=0, key=0)
    table.values.copy_(start_ND)

    def step(ids_T: np.ndarray, backward: Backward) -> None:
        rows_u, (places_T,) = distinct_rows([ids_T], table.num_rows)
        leaf = table.fetch(rows_u, zero_row=True).requires_grad_()
        backward(look_up(leaf, torch.from_numpy(places_T)))
        assert leaf.grad is not None
        table.update(leaf.grad[1:], learning_rate=RATE)

    return step


def torchs(start_ND: Tensor, sparse: bool) -> Rival:
    """`nn.Embedding` and an optimizer of torch, as their documentation has it."""
    weight = F.pad(start_ND, (0, 0, 1, 0))
    options: dict[str, Any] = {"freeze": False, "padding_idx": 0, "sparse": sparse}
    embedding = nn.Embedding.from_pretrained(weight, **options)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SparseAdam(embedding.parameters(), lr=1e-3)
        if sparse
        else torch.optim.AdamW(embedding.parameters(), lr=1e-3, fused=True)
    )

    def step(ids_T: np.ndarray, backward: Backward) -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(embedding(torch.from_numpy(ids_T)))
        optimizer.step()

    return step


def measure_peers(sizes: Sizes) -> Measured:
    """Seconds of a step's whole id part: ours, the plan of the rows included, and the peers'."""
    dice = torch.Generator().manual_seed(3)
    start_ND = torch.randn(sizes.peers, sizes.dim, generator=dice) * 0.02
    few = max(1, sizes.steps // 10)
    rivals: dict[str, tuple[Rival, int]] = {
        "ours": (ours(start_ND), sizes.steps),
        "SparseAdam": (torchs(start_ND, sparse=True), sizes.steps),
        "AdamW": (torchs(start_ND, sparse=False), few),
    }
    claims = []
    found: dict[str, Any] = {}
    for draw in DRAWS:
        batches = [draw_ids(draw, sizes.peers, sizes.rows, seed) for seed in range(3 * sizes.steps)]
        gradient_TD = torch.randn(max(map(len, batches)), sizes.dim, generator=dice)

        def step(rival: Rival, ids_T: np.ndarray, gradient_TD: Tensor = gradient_TD) -> None:
            rival(ids_T, lambda rows_TD: rows_TD.backward(gradient_TD[: len(rows_TD)]))

        runs = {
            name: _steps(partial(step, rival), batches, count)
            for name, (rival, count) in rivals.items()
        }
        times = in_turn(runs, sizes.repeats)
        seconds = {name: [t / rivals[name][1] for t in times[name]] for name in rivals}
        figures = {name: 1e3 * median(values) for name, values in seconds.items()}
        for name, peer, goal in (
            ("SparseAdam", "torch.optim.SparseAdam", ">= 2x"),
            ("AdamW", "dense AdamW(fused=True)", ">= 20x"),
        ):
            id = f"id part beside {name}, {sizes.peers:.0e} rows, {draw}"
            claims.append(make_claim(id, peer, figures["ours"], figures[name], "ms", goal))
        ids_per_step = float(np.mean([len(ids) for ids in batches]))
        found[draw] = {"seconds_a_step": seconds, "ids_a_step": ids_per_step}
    return claims, found


# Bytes between ranks.


def measure_wire(sizes: Sizes) -> Measured:
    """Bytes that two real gloo ranks send in a step, over the bytes of the rows they touch."""
    num_ranks = 2
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_wire_rank, (num_ranks, folder, sizes), nprocs=num_ranks)
        facts = np.stack([np.load(Path(folder) / f"rank-{rank}.npy") for rank in range(num_ranks)])
    claims = []
    found: dict[str, Any] = {}
    row_bytes = sizes.dim * 4
    for draw, sent_R, touched_R, seconds_R in zip(DRAWS, *facts.transpose(2, 1, 0), strict=True):
        id = f"wire, {num_ranks} gloo ranks, {sizes.peers:.0e} rows, {draw}"
        ours, theirs = sent_R.sum() / sizes.steps, touched_R.sum() * row_bytes / sizes.steps
        peer, unit = "the touched rows themselves", "bytes a step"
        claims.append(make_claim(id, peer, float(ours), float(theirs), unit, "<= 2x"))
        found[draw] = {
            "bytes_by_rank": sent_R.tolist(),
            "rows_by_rank": touched_R.tolist(),
            "row_bytes": row_bytes,
            "steps": sizes.steps,
            "seconds_a_step": float(seconds_R.max()) / sizes.steps,
        }
    return claims, found


def _wire_rank(rank: int, num_ranks: int, folder: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of this leaves the machine
    address = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)
    facts = []
    for draw in DRAWS:
        table = RowTable(
            sizes.peers, sizes.dim, init_std=0.02, key=1, rank=rank, world_size=num_ranks
        )
        seeds = [step * num_ranks + rank for step in range(sizes.steps)]
        ids = [draw_ids(draw, sizes.peers, sizes.rows, seed) for seed in seeds]
        plans = [distinct_rows([one], sizes.peers)[0] for one in ids]
        dist.barrier()
        start = time.perf_counter()
        for rows_u in plans:
            id_step(table, rows_u)
        facts.append([table.bytes_sent, table.rows_fetched, time.perf_counter() - start])
    np.save(Path(folder) / f"rank-{rank}.npy", np.array(facts))  # [draw, (sent, touched, seconds)]
    dist.barrier()
    dist.destroy_process_group()
