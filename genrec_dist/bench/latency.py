"""Latency of recommending: one caller, and several at once beside a lock round decoding one history
at a time."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset

from genrec_dist.bench.measure import Claim, table
from genrec_dist.bench.stream import make_data
from genrec_dist.config.load import load_recipe
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words
from genrec_dist.inference.load import (
    Catalogue,
    LoadedRun,
    best_device,
    check_numbering,
    load_run,
    make_layout,
    make_searcher,
)
from genrec_dist.inference.recommend import Recommender
from genrec_dist.model.build import ModelSizes, build_model

SHARED, LOCKED = "shared", "locked"
LOCK = "a lock round each call"
LONE_CALL_GOAL = 1.05


def _thread_settings() -> tuple[int, ...]:
    return tuple(sorted({1, len(os.sched_getaffinity(0))}))


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = 22_363
    """Of the synthetic histories that stand in where no data is given: those of Beauty."""
    items: int = 12_101
    callers: int = 8
    calls: int = 200
    """Of a round, by all callers together."""
    rounds: int = 5
    """Of each way and number of callers, besides one to warm up."""
    threads: tuple[int, ...] = field(default_factory=_thread_settings)
    """Settings of `torch.set_num_threads`; claims are those of the first."""


def bench_latency(
    run: Path | None = None, data: Path | None = None, sizes: Sizes | None = None
) -> tuple[list[Claim], dict[str, Any]]:
    """All of it. `run`: a trained run, or None for random weights in the shape of `tiny`. `data`: a
    directory of `genrec prepare` whose histories are asked, or None for synthetic ones.

    Raises ValueError if run and data speak of other items, AssertionError if the two ways give
    different lists."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as folder:
        made = (
            load_dataset(data)
            if data
            else make_data(Path(folder) / "made", sizes.users, sizes.items)
        )
    # Not every item of a synthetic catalogue has been taken by somebody.
    item_ids = made.sequences.item_ids if data else [str(item) for item in range(sizes.items)]
    loaded = load_run(run, best_device()) if run else random_run(item_ids)
    if run and data:
        check_numbering(loaded, made)
    recommender = Recommender(loaded)
    histories = histories_of(made, loaded.catalogue)
    check_same(recommender, histories[:64])
    before = torch.get_num_threads()
    try:
        measured = [
            found
            for threads in sizes.threads
            for found in measure(recommender, histories, threads, sizes)
        ]
    finally:
        torch.set_num_threads(before)
    lengths = [len(history) for history in histories]
    described = {
        "run": run.name if run else "random weights, the shape of tiny",
        "histories": data.name if data else "synthetic",
        "items": len(loaded.catalogue.item_ids),
        "items a history": {"mean": float(np.mean(lengths)), "longest": max(lengths)},
        "beam": recommender.beam,
        "device": str(loaded.searcher.device),
    }
    claims = claims_of(measured, sizes)
    return claims, table("latency", claims, sizes=vars(sizes), data=described, measured=measured)


def random_run(item_ids: list[str]) -> LoadedRun:
    """`tiny` before its first step, over items whose codes are their places."""
    recipe, device = load_recipe("tiny"), best_device()
    codes = [str(place) for place in range(1, len(item_ids) + 1)]
    tokenizer = train_tokenizer(codes, recipe.tokens.vocab_size)
    words = build_words(tokenizer, codes, [])
    special = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos", "mask")
    }
    torch.manual_seed(0)
    model = build_model(
        recipe.model,
        ModelSizes(
            vocab_size=len(tokenizer),
            num_users=0,
            num_items=len(item_ids),
            num_masks=1,
            special=special,
        ),
    )
    model = model.to(device).eval()
    layout, searcher = make_layout(words, model.config), make_searcher(model, words, device)
    return LoadedRun(
        Path("random"),
        model,
        tokenizer,
        words,
        layout,
        searcher,
        Catalogue(item_ids, codes, [], []),
    )


def histories_of(dataset: Dataset, catalogue: Catalogue) -> list[list[str]]:
    """The users' sequences in a random order. Where the data is another's, its rows stand for the
    catalogue's items."""
    sequences, ids = dataset.sequences, np.array(catalogue.item_ids, object)
    starts = sequences.offsets
    order = np.random.default_rng(0).permutation(sequences.num_users)
    return [
        ids[sequences.items[starts[user] : starts[user + 1]] % len(ids)].tolist() for user in order
    ]


def check_same(recommender: Recommender, histories: Sequence[Sequence[str]]) -> None:
    """Raises AssertionError if a history gets another list alone than in a batch, but for the
    rounding of its scores."""
    for history, shared in zip(histories, recommender.recommend(histories), strict=True):
        (alone,) = recommender.recommend([history])
        assert np.allclose(alone.scores, shared.scores, rtol=0, atol=1e-4)


def measure(
    recommender: Recommender, histories: Sequence[Sequence[str]], threads: int, sizes: Sizes
) -> list[dict[str, Any]]:
    """Both ways in turn, for one caller and for all, with `threads` of torch's threads."""
    torch.set_num_threads(threads)
    lock = threading.Lock()

    def shared(history: Sequence[str]) -> None:
        recommender.recommend([history])

    def locked(history: Sequence[str]) -> None:
        with lock:
            recommender.recommend([history])

    ways: dict[str, Callable[[Sequence[str]], None]] = {SHARED: shared, LOCKED: locked}
    found = []
    for callers in (1, sizes.callers):
        latencies: dict[str, list[float]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        asked = cycle(histories)
        with ThreadPoolExecutor(callers) as pool:
            for turn in range(sizes.rounds + 1):
                part = list(islice(asked, -(-sizes.calls // callers) * callers))
                for name, way in ways.items():
                    taken, each = one_round(pool, callers, way, part)
                    if turn:
                        seconds[name].append(taken)
                        latencies[name] += each
        found += [summary(name, callers, threads, latencies[name], seconds[name]) for name in ways]
    return found


def one_round(
    pool: ThreadPoolExecutor,
    callers: int,
    way: Callable[[Sequence[str]], None],
    histories: Sequence[Sequence[str]],
) -> tuple[float, list[float]]:
    """(seconds of the round, seconds of each call): all callers begin together and ask for one
    history after another."""
    gate = threading.Barrier(callers + 1)

    def caller(number: int) -> list[float]:
        gate.wait()
        taken = []
        for history in histories[number::callers]:
            start = time.perf_counter()
            way(history)
            taken.append(time.perf_counter() - start)
        return taken

    # A barrier that all must reach: each thread of the pool is one caller.
    futures = [pool.submit(caller, number) for number in range(callers)]
    gate.wait()
    start = time.perf_counter()
    each = [taken for future in futures for taken in future.result()]
    return time.perf_counter() - start, each


def summary(
    way: str, callers: int, threads: int, latencies: list[float], seconds: list[float]
) -> dict[str, Any]:
    """Percentiles of single calls in milliseconds; calls a second of the median round."""
    p50, p95, p99 = np.percentile(np.array(latencies) * 1e3, [50, 95, 99]).tolist()
    calls_a_round = len(latencies) / len(seconds)
    return {
        "way": way,
        "callers": callers,
        "torch threads": threads,
        "calls": len(latencies),
        "p50 ms": p50,
        "p95 ms": p95,
        "p99 ms": p99,
        "calls/s": calls_a_round / float(np.median(seconds)),
        "seconds a round": seconds,
    }


def claims_of(measured: list[dict[str, Any]], sizes: Sizes) -> list[Claim]:
    threads = sizes.threads[0]

    def of(way: str, callers: int) -> dict[str, Any]:
        return next(
            row
            for row in measured
            if (row["way"], row["callers"], row["torch threads"]) == (way, callers, threads)
        )

    lone, lone_locked = of(SHARED, 1), of(LOCKED, 1)
    ours, theirs = of(SHARED, sizes.callers), of(LOCKED, sizes.callers)
    lone_ratio = lone["p50 ms"] / lone_locked["p50 ms"]
    slower, faster = theirs["p95 ms"] / ours["p95 ms"], ours["calls/s"] / theirs["calls/s"]
    return [
        Claim("p50, 1 caller", LOCK, lone["p50 ms"], lone_locked["p50 ms"], "ms", lone_ratio,
              f"<= {LONE_CALL_GOAL}x", lone_ratio <= LONE_CALL_GOAL),
        Claim(f"p95, {sizes.callers} callers", LOCK, ours["p95 ms"], theirs["p95 ms"], "ms", slower, ">= 1x", slower >= 1),
        Claim(f"calls, {sizes.callers} callers", LOCK, ours["calls/s"], theirs["calls/s"], "calls/s", faster, "> 1x", faster > 1),
    ]  # fmt: skip


def format_latencies(measured: list[dict[str, Any]]) -> str:
    """A plain table for the terminal."""
    names = ("way", "callers", "torch threads", "calls", "p50 ms", "p95 ms", "p99 ms", "calls/s")
    rows = [
        [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        for row in measured
    ]
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(len(names))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in [names, *rows]
    )
