"""Id tables that grow: a step at 10^5 to 10^7 rows, torch's sparse and dense optimisers beside it,
and the bytes on the wire."""

# N table rows, D width of a row, T ids of a step, u distinct rows among them

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from genrec_kernels.sharded_rows import RowTable, distinct_rows, look_up
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.bench.measure import Claim, in_turn, median, table
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Optimizer
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import FetchedRows, choose_attention
from genrec_dist.model.optimizer import build_optimizer

Draw = Literal["zipf", "uniform"]
DRAWS: tuple[Draw, ...] = ("zipf", "uniform")
RATE = 0.05
SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
VOCABULARY, LENGTH = 16_384, 40


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    growth: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Rows of the tables whose steps are compared; the claim is the last over the first."""
    peers: int = 1_000_000
    """Rows of the table that stands beside the peers'."""
    dim: int = 64
    rows: int = 20_000
    """Distinct rows of a step."""
    steps: int = 10
    """Steps of one measurement; the dense peer takes a tenth."""
    samples: int = 512
    """Of a training step, 40 tokens each."""
    model_steps: int = 2
    """Training steps of one measurement."""
    quality_steps: int = 400
    repeats: int = 5
    rates: tuple[float, ...] = (0.03, 0.06, 0.1, 0.2)
    """Learning rates of ours in the task that compares quality."""
    peer_rates: tuple[float, ...] = (0.003, 0.006, 0.01, 0.02)


def bench_rows(sizes: Sizes | None = None) -> tuple[list[Claim], dict[str, Any]]:
    """All of it, on one thread: the claims, and the table that `--json` writes."""
    sizes = sizes or Sizes()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grown, growth = measure_growth(sizes)
        beaten, peers = measure_peers(sizes)
        level, quality = measure_quality(sizes)
        on_wire, wire = measure_wire(sizes)
        claims = [*grown, *beaten, *level, *on_wire]
        more = {
            "sizes": vars(sizes),
            "growth": growth,
            "peers": peers,
            "quality": quality,
            "wire": wire,
        }
        return claims, table("rows", claims, **more)
    finally:
        torch.set_num_threads(threads)


def draw_ids(draw: Draw, num_rows: int, distinct: int, seed: int) -> np.ndarray:
    """int64 [T], ids in the convention of a batch (row + 1) with about `distinct` rows among them,
    in random order.

    "uniform": `distinct` rows, each once. "zipf": the popularity of rank r falls as 1 / r, drawn
    until so many were seen."""
    dice = np.random.default_rng([seed, num_rows])
    if draw == "uniform":
        return dice.permutation(dice.choice(num_rows, distinct, replace=False)) + 1
    ranks = np.empty(0, np.int64)
    while True:
        more = np.exp(dice.random(distinct) * np.log(num_rows)).astype(np.int64)
        ranks = np.concatenate([ranks, more])
        _, first = np.unique(ranks, return_index=True)
        if len(first) >= distinct:
            # Popularity is no function of the row: neighbours in rank are strangers in the table.
            return (ranks[: np.sort(first)[distinct - 1] + 1] * 7_368_787) % num_rows + 1


# A step as the table grows.


class TrainingStep:
    """A step of `tiny` with its item table outside, `dim` wide: what `genrec train` does, on ids
    drawn for the purpose."""

    def __init__(self, dim: int, num_rows: int, samples: int):
        shape = replace(load_recipe("tiny").model, id_dim=dim)
        torch.manual_seed(0)
        self.model = build_model(
            shape,
            ModelSizes(
                vocab_size=VOCABULARY,
                num_users=0,
                num_items=num_rows,
                num_masks=1,
                special=SPECIAL,
                ids_outside=True,
            ),
        )
        choose_attention(self.model, "bf16")
        assert isinstance(self.model.item_embedding, FetchedRows)
        self.fetched = self.model.item_embedding
        self.optimizer = build_optimizer(self.model, Optimizer())
        dice = torch.Generator().manual_seed(1)
        self.inputs = {
            "input_ids": torch.randint(5, VOCABULARY, (samples, LENGTH), generator=dice),
            "encoder_row": torch.arange(samples),
            "decoder_input_ids": torch.tensor([[SPECIAL["mask"], 5]]).expand(samples, -1),
            "labels": torch.tensor([[5, SPECIAL["eos"]]]).expand(samples, -1),
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


def measure_growth(sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Seconds of the id part alone (fetch and update), and of a training step that holds it, by
    rows of the table."""
    tables = {n: RowTable(n, sizes.dim, init_std=0.02, key=1) for n in sizes.growth}
    training_step = TrainingStep(sizes.dim, sizes.growth[-1], sizes.samples)
    claims: list[Claim] = []
    found: dict[str, Any] = {}
    for draw in DRAWS:
        alone = {
            str(n): _each(
                partial(_id_step, tables[n]), _plans(draw, n, sizes, sizes.steps), sizes.steps
            )
            for n in sizes.growth
        }
        whole = {
            str(n): _each(
                partial(training_step, tables[n]), _batches(draw, n, sizes), sizes.model_steps
            )
            for n in sizes.growth
        }
        for what, rivals, steps in (
            ("step", whole, sizes.model_steps),
            ("id-part", alone, sizes.steps),
        ):
            seconds = {
                name: _a_step(times, steps)
                for name, times in in_turn(rivals, sizes.repeats).items()
            }
            first, last = (median(seconds[str(n)]) for n in (sizes.growth[0], sizes.growth[-1]))
            claims.append(
                Claim(
                    id=f"{what}, {sizes.growth[-1]:.0e} rows, {draw}",
                    peer=f"the same, {sizes.growth[0]:.0e} rows",
                    ours=1e3 * last, theirs=1e3 * first, unit="ms",
                    ratio=last / first, goal="<= 1.2x", holds=last <= 1.2 * first,
                )
            )  # fmt: skip
            found[f"{what}, {draw}"] = seconds
    return claims, {
        "seconds_a_step": found,
        "rows_a_step": sizes.rows,
        "tokens_a_training_step": sizes.samples * LENGTH,
    }


def _id_step(table: RowTable, rows_u: Tensor) -> None:
    # The rows stand for their own gradient: as large, as warm in the cache, and update() may use
    # them up.
    table.update(table.fetch(rows_u), learning_rate=RATE)


def _plans(draw: Draw, num_rows: int, sizes: Sizes, count: int) -> list[Tensor]:
    # More batches than one measurement takes, so that it does not meet the rows it has just left in
    # the cache.
    ids = [draw_ids(draw, num_rows, sizes.rows, seed) for seed in range(3 * count)]
    return [distinct_rows([one], num_rows)[0] for one in ids]


def _batches(draw: Draw, num_rows: int, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for seed in range(3 * sizes.model_steps):
        ids = draw_ids(draw, num_rows, sizes.rows, seed)
        # A draw with repeats has more ids than the batch has places: its distinct rows come first,
        # then repeats.
        ids = np.resize(np.concatenate([np.unique(ids), ids]), sizes.samples * LENGTH)
        ids = np.random.default_rng(seed).permutation(ids).reshape(sizes.samples, LENGTH)
        rows, (places,) = distinct_rows([ids], num_rows)
        batches.append((rows, torch.from_numpy(places)))
    return batches


def _each(step: Callable[[Any], None], batches: list[Any], count: int) -> Callable[[], None]:
    """`count` steps, each call with the next of the batches."""
    start = 0

    def run() -> None:
        nonlocal start
        for number in range(count):
            step(batches[(start + number) % len(batches)])
        start += count

    return run


def _a_step(times: list[float], steps: int) -> list[float]:
    return [seconds / steps for seconds in times]


# Beside torch's own: lookup, backward and optimiser, for the same batches.


class Ours:
    """Fetch, lookup, backward, update."""

    def __init__(self, start_ND: Tensor, rate: float):
        num_rows, dim = start_ND.shape
        self.table = RowTable(num_rows, dim, init_std=0, key=0)
        self.table.values.copy_(start_ND)
        self.rate = rate

    def __call__(self, ids_T: np.ndarray, backward: Callable[[Tensor], None]) -> None:
        self.planned(self.plan(ids_T), backward)

    def plan(self, ids_T: np.ndarray) -> tuple[Tensor, Tensor]:
        """What a data worker does beside the loop: (rows int64 [u], places int64 [T])."""
        rows, (places_T,) = distinct_rows([ids_T], self.table.num_rows)
        return rows, torch.from_numpy(places_T)

    def planned(self, batch: tuple[Tensor, Tensor], backward: Callable[[Tensor], None]) -> None:
        rows_u, places_T = batch
        leaf = self.table.fetch(rows_u, zero_row=True).requires_grad_()
        backward(look_up(leaf, places_T))
        assert leaf.grad is not None
        self.table.update(leaf.grad[1:], learning_rate=self.rate)

    def look_up(self, ids_T: np.ndarray) -> Tensor:
        return self.table.values[torch.from_numpy(ids_T) - 1]


class Torchs:
    """`nn.Embedding` and an optimiser of torch, as their documentation has it."""

    def __init__(self, start_ND: Tensor, rate: float, sparse: bool):
        weight = F.pad(start_ND, (0, 0, 1, 0))
        self.embedding = nn.Embedding.from_pretrained(
            weight, freeze=False, padding_idx=0, sparse=sparse
        )
        parameters = list(self.embedding.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SparseAdam(parameters, lr=rate)
            if sparse
            else torch.optim.AdamW(parameters, lr=rate, fused=True)
        )

    def __call__(self, ids_T: np.ndarray, backward: Callable[[Tensor], None]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        backward(self.embedding(torch.from_numpy(ids_T)))
        self.optimizer.step()

    @torch.no_grad()
    def look_up(self, ids_T: np.ndarray) -> Tensor:
        return self.embedding(torch.from_numpy(ids_T))


Rival = Ours | Torchs


def measure_peers(sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Seconds of a step's whole id part: ours, also with the plan a data worker would make,
    SparseAdam's, dense AdamW's."""
    start_ND = torch.randn(sizes.peers, sizes.dim, generator=torch.Generator().manual_seed(3)).mul_(
        0.02
    )
    ours = Ours(start_ND, RATE)
    sparse, dense = Torchs(start_ND, 1e-3, sparse=True), Torchs(start_ND, 1e-3, sparse=False)
    claims: list[Claim] = []
    found: dict[str, Any] = {}
    for draw in DRAWS:
        batches = [draw_ids(draw, sizes.peers, sizes.rows, seed) for seed in range(3 * sizes.steps)]
        gradient_TD = torch.randn(
            max(map(len, batches)), sizes.dim, generator=torch.Generator().manual_seed(4)
        )

        def taken(step: Callable[..., None], batch: Any, gradient_TD: Tensor = gradient_TD) -> None:
            step(batch, lambda rows_TD: rows_TD.backward(gradient_TD[: len(rows_TD)]))

        few = max(1, sizes.steps // 10)
        runs: dict[str, tuple[Callable[[Any], None], list[Any], int]] = {
            "ours": (
                partial(taken, ours.planned),
                [ours.plan(ids_T) for ids_T in batches],
                sizes.steps,
            ),
            "ours, plan counted": (partial(taken, ours), batches, sizes.steps),
            "SparseAdam": (partial(taken, sparse), batches, sizes.steps),
            "AdamW": (partial(taken, dense), batches, few),
        }
        times = in_turn({name: _each(*run) for name, run in runs.items()}, sizes.repeats)
        seconds = {name: _a_step(times[name], run[-1]) for name, run in runs.items()}
        for name in ("ours", "ours, plan counted"):
            mine = median(seconds[name])
            for rival, peer, least in (
                ("SparseAdam", "torch.optim.SparseAdam", 2),
                ("AdamW", "dense AdamW(fused=True)", 20),
            ):
                theirs = median(seconds[rival])
                claims.append(
                    Claim(
                        id=f"id part beside {rival}, {sizes.peers:.0e} rows, {draw}" + name.removeprefix("ours"),
                        peer=peer, ours=1e3 * mine, theirs=1e3 * theirs, unit="ms",
                        ratio=theirs / mine, goal=f">= {least}x", holds=theirs >= least * mine,
                    )
                )  # fmt: skip
        found[draw] = {
            "seconds_a_step": seconds,
            "ids_a_step": float(np.mean([len(batch) for batch in batches])),
        }
    return claims, found


# The same quality.


class Task:
    """Will this id be taken in this context? Each row has a hidden vector; the log-odds are its
    product with the context.

    A learner sees the context through a fixed matrix [hidden, D] and learns the id's row, so that
    the best possible loss is known: that of the hidden vectors themselves."""

    HIDDEN = 16

    def __init__(self, num_rows: int, dim: int, num_ids: int):
        self.num_rows, self.num_ids = num_rows, num_ids
        self.hidden_NH = np.random.default_rng(5).standard_normal(
            (num_rows, self.HIDDEN), np.float32
        )
        mixed = np.linalg.qr(np.random.default_rng(6).standard_normal((dim, self.HIDDEN)))[0]
        self.mix_HD = torch.from_numpy(mixed.T.astype(np.float32))

    def batch(self, seed: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """(ids int64 [T], contexts float32 [T, D], labels float32 [T], true log-odds [T])."""
        dice = np.random.default_rng([7, seed])
        ranks = np.exp(dice.random(self.num_ids) * np.log(self.num_rows)).astype(np.int64)
        rows = ranks * 7_368_787 % self.num_rows
        contexts = dice.standard_normal((self.num_ids, self.HIDDEN), np.float32)
        odds = (self.hidden_NH[rows] * contexts).sum(1)
        labels = dice.random(self.num_ids) < 1 / (1 + np.exp(-odds))
        return (
            rows + 1,
            torch.from_numpy(contexts) @ self.mix_HD,
            torch.from_numpy(labels.astype(np.float32)),
            torch.from_numpy(odds),
        )


def measure_quality(sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Held-out loss of ours and of SparseAdam after the same steps, each at the best learning rate
    of its grid."""
    task = Task(sizes.peers, sizes.dim, 2 * sizes.rows)
    start_ND = torch.randn(sizes.peers, sizes.dim, generator=torch.Generator().manual_seed(8)).mul_(
        0.02
    )
    grids: dict[str, tuple[tuple[float, ...], Callable[[float], Rival]]] = {
        "ours": (sizes.rates, lambda rate: Ours(start_ND, rate)),
        "SparseAdam": (sizes.peer_rates, lambda rate: Torchs(start_ND, rate, True)),
    }
    losses = {
        name: {str(rate): _learn(make(rate), task, sizes.quality_steps) for rate in rates}
        for name, (rates, make) in grids.items()
    }
    held_out = [task.batch(-1 - number & 0xFFFF) for number in range(5)]
    best_possible = float(
        np.mean(
            [F.binary_cross_entropy_with_logits(odds, labels) for _, _, labels, odds in held_out]
        )
    )
    best = {name: min(by_rate.values()) for name, by_rate in losses.items()}
    claim = Claim(
        id=f"held-out loss beside SparseAdam, {sizes.peers:.0e} rows, zipf", peer="torch.optim.SparseAdam",
        ours=best["ours"], theirs=best["SparseAdam"], unit="nats",
        ratio=best["SparseAdam"] / best["ours"], goal=">= 0.99x", holds=best["SparseAdam"] >= 0.99 * best["ours"],
    )  # fmt: skip
    return [claim], {
        "held_out_loss_by_rate": losses,
        "best_possible": best_possible,
        "untrained": float(np.log(2)),
        "steps": sizes.quality_steps,
        "ids_a_step": task.num_ids,
    }


def _learn(rival: Rival, task: Task, steps: int) -> float:
    """Held-out loss after so many steps."""

    def backward(contexts_TD: Tensor, labels_T: Tensor, rows_TD: Tensor) -> None:
        odds_T = (rows_TD * contexts_TD).sum(1)
        # The sum, not the mean: how fast a row learns must not hang on the size of the batch.
        F.binary_cross_entropy_with_logits(odds_T, labels_T, reduction="sum").backward()

    for step in range(steps):
        ids_T, contexts_TD, labels_T, _ = task.batch(step)
        rival(ids_T, partial(backward, contexts_TD, labels_T))
    losses = []
    for number in range(5):
        ids_T, contexts_TD, labels_T, _ = task.batch(-1 - number & 0xFFFF)
        odds_T = (rival.look_up(ids_T) * contexts_TD).sum(1)
        losses.append(float(F.binary_cross_entropy_with_logits(odds_T, labels_T)))
    return float(np.mean(losses))


# The wire.


def measure_wire(sizes: Sizes, num_ranks: int = 2) -> tuple[list[Claim], dict[str, Any]]:
    """Bytes that real gloo ranks send in a step, over the bytes of the rows they touch."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_wire_rank, (num_ranks, folder, sizes), nprocs=num_ranks)
        facts = np.stack([np.load(Path(folder) / f"rank-{rank}.npy") for rank in range(num_ranks)])
    claims: list[Claim] = []
    found: dict[str, Any] = {}
    row_bytes = sizes.dim * 4
    for draw, facts_of in zip(DRAWS, facts.swapaxes(0, 1), strict=True):
        sent, touched, _ = facts_of.sum(0).tolist()
        claims.append(
            Claim(
                id=f"wire, {num_ranks} gloo ranks, {sizes.peers:.0e} rows, {draw}", peer="the touched rows themselves",
                ours=sent / sizes.steps, theirs=touched * row_bytes / sizes.steps, unit="bytes a step",
                ratio=sent / (touched * row_bytes), goal="<= 2x", holds=sent <= 2 * touched * row_bytes,
            )
        )  # fmt: skip
        found[draw] = {
            "bytes_by_rank": facts_of[:, 0].tolist(),
            "rows_by_rank": facts_of[:, 1].tolist(),
            "row_bytes": row_bytes,
            "steps": sizes.steps,
            "seconds_a_step": float(facts_of[:, 2].max()) / sizes.steps,
        }
    return claims, found


def _wire_rank(rank: int, num_ranks: int, folder: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of this leaves the machine
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks
    )
    facts = []
    for draw in DRAWS:
        table = RowTable(
            sizes.peers, sizes.dim, init_std=0.02, key=1, rank=rank, world_size=num_ranks
        )
        ids = [
            draw_ids(draw, sizes.peers, sizes.rows, step * num_ranks + rank)
            for step in range(sizes.steps)
        ]
        plans = [distinct_rows([one], sizes.peers)[0] for one in ids]
        dist.barrier()
        start = time.perf_counter()
        for rows_u in plans:
            _id_step(table, rows_u)
        facts.append([table.bytes_sent, table.rows_fetched, time.perf_counter() - start])
    np.save(Path(folder) / f"rank-{rank}.npy", np.array(facts))
    dist.barrier()
    dist.destroy_process_group()
