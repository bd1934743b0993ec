"""Latency of recommending: one caller, and several at once beside a lock around each call; and of
the same over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset

from genrec_dist.bench.measure import (
    Claim,
    Measured,
    format_columns,
    make_claim,
    table,
    torch_threads,
)
from genrec_dist.bench.synthetic import BEAUTY_ITEMS, BEAUTY_USERS, open_data
from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.inference.item_filter import find_rows
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
SERVED, GENERATED, DIRECT = "served", "generate, served", "in process"
CALLERS = (1, 8, 64)
"""Of a server, at once."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = BEAUTY_USERS
    """Of the synthetic histories that are used where no data is given."""
    items: int = BEAUTY_ITEMS
    callers: int = 8
    calls: int = 200
    """Per round, by all callers together."""
    rounds: int = 5
    """Of each way and number of callers, besides one to warm up."""
    threads: int = 1
    """Of torch; on a CPU a single one gives the shortest latency (docs/decoding.md)."""


TINY = Sizes(users=100, items=50, callers=3, calls=12, rounds=2)


def bench_latency(
    run: Path | None = None, data: Path | None = None, sizes: Sizes | None = None
) -> Measured:
    """The claims and the table of `genrec bench latency`.

    Args:
        run: a trained run; None: random weights in the shape of `tiny`.
        data: a directory of `genrec prepare` whose histories are requested; None: synthetic ones.

    Raises:
        ValueError: if run and data have different items.
        AssertionError: if a history gets another list alone than in a batch.
    """
    sizes = sizes or Sizes()
    dataset, described = open_data(data, sizes.users, sizes.items)
    loaded = load_run(run, best_device()) if run else random_run(dataset.sequences.item_ids)
    if run and data:
        check_numbering(loaded, dataset)
    recommender = Recommender(loaded)
    histories = histories_of(dataset, loaded.catalogue)
    check_same(recommender, histories[:64])
    with torch_threads(sizes.threads):
        measured = measure(recommender, histories, sizes)
    lengths = [len(history) for history in histories]
    facts = {
        "run": run.name if run else "random weights, the shape of tiny",
        "histories": described.pop("source"),
        "items": len(loaded.catalogue.item_ids),
        "items a history": {"mean": float(np.mean(lengths)), "longest": max(lengths)},
        "beam": recommender.beam,
        "device": str(loaded.searcher.device),
    }
    claims = claims_of(measured, sizes)
    return claims, table("latency", claims, sizes=vars(sizes), data=facts, measured=measured)


def random_run(item_ids: list[str]) -> LoadedRun:
    """`tiny` before its first step, over items whose codes are their places."""
    recipe, device = load_recipe("tiny"), best_device()
    codes = [str(place) for place in range(1, len(item_ids) + 1)]
    tokenizer = train_tokenizer(codes, recipe.tokens.vocab_size)
    words = build_words(tokenizer, codes, [])
    names = ("bos", "pad", "eos", "mask")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    sizes = ModelSizes(
        vocab_size=len(tokenizer),
        num_users=0,
        num_items=len(item_ids),
        num_masks=1,
        special=special,
    )
    torch.manual_seed(0)
    model = build_model(recipe.model, sizes).to(device).eval()
    layout, searcher = make_layout(words, model.config), make_searcher(model, words, device)
    catalogue = Catalogue(item_ids, codes, [], [])
    return LoadedRun(Path("random"), model, tokenizer, words, layout, searcher, catalogue)


def histories_of(dataset: Dataset, catalogue: Catalogue) -> list[list[str]]:
    """The users' sequences in random order, as ids of the catalogue.

    Where the data is another's, its rows are taken as rows of the catalogue."""
    sequences, ids = dataset.sequences, np.array(catalogue.item_ids, object)
    users = np.random.default_rng(0).permutation(sequences.num_users)
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    return [ids[sequences.items[starts[u] : ends[u]] % len(ids)].tolist() for u in users]


def check_same(recommender: Recommender, histories: Sequence[Sequence[str]]) -> None:
    """Raises AssertionError if a history gets other scores alone than in a batch."""
    for history, shared in zip(histories, recommender.recommend(histories), strict=True):
        (alone,) = recommender.recommend([history])
        assert np.allclose(alone.scores, shared.scores, rtol=0, atol=1e-4)


def measure(
    recommender: Recommender, histories: Sequence[Sequence[str]], sizes: Sizes
) -> list[dict[str, Any]]:
    """A row for each way and number of callers, the ways in turn."""
    lock = threading.Lock()

    def shared(history: Sequence[str]) -> None:
        recommender.recommend([history])

    def locked(history: Sequence[str]) -> None:
        with lock:
            recommender.recommend([history])

    return measure_ways({SHARED: shared, LOCKED: locked}, histories, sizes, (1, sizes.callers))


def measure_ways(
    ways: Mapping[str, Callable[[Sequence[str]], object]],
    histories: Sequence[Sequence[str]],
    sizes: Sizes,
    callers_each: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each way and each number of callers, the ways in turn."""
    rows = []
    for callers in callers_each:
        latencies: dict[str, list[float]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        requests = cycle(histories)
        with ThreadPoolExecutor(callers) as pool:
            for turn in range(sizes.rounds + 1):
                batch = list(islice(requests, -(-sizes.calls // callers) * callers))
                for name, way in ways.items():
                    taken, each = one_round(pool, callers, way, batch)
                    if turn:  # the first one warms up
                        seconds[name].append(taken)
                        latencies[name] += each
        rows += [summary(name, callers, latencies[name], seconds[name]) for name in ways]
    return rows


def one_round(
    pool: ThreadPoolExecutor,
    callers: int,
    way: Callable[[Sequence[str]], object],
    histories: Sequence[Sequence[str]],
) -> tuple[float, list[float]]:
    """(seconds of the round, seconds of each call): all callers start together and request one
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

    # All must reach the barrier, so each thread of the pool is one caller.
    futures = [pool.submit(caller, number) for number in range(callers)]
    gate.wait()
    start = time.perf_counter()
    each = [taken for future in futures for taken in future.result()]
    return time.perf_counter() - start, each


def summary(way: str, callers: int, latencies: list[float], seconds: list[float]) -> dict[str, Any]:
    """Percentiles of single calls in milliseconds; calls per second of the median round."""
    p50, p95, p99 = np.percentile(np.array(latencies) * 1e3, [50, 95, 99]).tolist()
    return {
        "way": way,
        "callers": callers,
        "torch threads": torch.get_num_threads(),
        "calls": len(latencies),
        "p50 ms": p50,
        "p95 ms": p95,
        "p99 ms": p99,
        "calls/s": len(latencies) / len(seconds) / float(np.median(seconds)),
        "seconds a round": seconds,
    }


def claims_of(measured: list[dict[str, Any]], sizes: Sizes) -> list[Claim]:
    rows = {(row["way"], row["callers"]): row for row in measured}
    claims = []
    for callers, figure, goal in (
        (1, "p50 ms", "<= 1.05x"),
        (sizes.callers, "p95 ms", ">= 1x"),
        (sizes.callers, "calls/s", "> 1x"),
    ):
        ours, theirs = rows[SHARED, callers][figure], rows[LOCKED, callers][figure]
        name = "calls" if figure == "calls/s" else figure.removesuffix(" ms")
        unit = "calls/s" if figure == "calls/s" else "ms"
        who = f"{callers} caller{'s' if callers > 1 else ''}"
        claims.append(make_claim(f"{name}, {who}", LOCK, ours, theirs, unit, goal))
    return claims


def format_latencies(table: dict[str, Any]) -> str:
    """A plain table for the terminal."""
    names = ("way", "callers", "torch threads", "calls", "p50 ms", "p95 ms", "p99 ms", "calls/s")
    texts = [
        [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        for row in table["measured"]
    ]
    return format_columns([names, *texts])


def bench_serve(run: Path, data: Path, sizes: Sizes | None = None) -> Measured:
    """The table of `genrec bench serve`: requests to a server beside the same calls in process, and
    beside the same server with Hugging Face's `generate` in it, where that can decode the model.

    Args:
        run: a trained run; its decoder alone is measured.
        data: the directory it was trained on, whose histories are requested.

    Raises:
        ValueError: if run and data have different items, or a server does not start.
        AssertionError: if a server gives other lists.
    """
    sizes = sizes or Sizes(calls=16)
    # `generate` lists what the history holds.
    recommender = Recommender.load(run, best_device(), mode="exact", exclude_history=False)
    dataset = load_dataset(data)
    check_numbering(recommender.run, dataset)
    histories = histories_of(dataset, recommender.run.catalogue)
    queue, threads = str(max(CALLERS)), str(sizes.threads)
    ours = ["genrec_dist.cli", "serve", str(run), "--decode", "exact", "--exclude-history", "no"]
    ours += ["--port", "0", "--queue", queue, "--threads", threads]
    theirs = ["genrec_dist.bench.peers.serve", str(run), queue, threads]
    can_generate = generate_decodes(recommender.run.model.config)
    peers = {GENERATED: "the same server with generate"} if can_generate else {}
    peers[DIRECT] = "the same calls in process"

    def direct(history: Sequence[str]) -> Any:
        return recommender.recommend([history])

    with ExitStack() as stack:
        stack.enter_context(torch_threads(sizes.threads))
        ways: dict[str, Callable[[Sequence[str]], Any]]
        ways = {SERVED: stack.enter_context(_serving(ours)), DIRECT: direct}
        if can_generate:
            ways[GENERATED] = stack.enter_context(_serving(theirs))
        for history in histories[:16]:
            (alone,) = recommender.recommend([history])
            found = ways[SERVED](history)["scores"]
            assert np.allclose(found, alone.scores, rtol=0, atol=1e-4)
            if can_generate:
                found = ways[GENERATED](history)["scores"]
                by_its_rule = _scores_by_generates_rule(recommender, history)
                assert np.allclose(found, by_its_rule, rtol=0, atol=1e-4)
        measured = measure_ways(ways, histories, sizes, CALLERS)
    rows = {(row["way"], row["callers"]): row for row in measured}
    claims = [
        make_claim(
            f"{'calls' if figure == 'calls/s' else figure.removesuffix(' ms')}, {callers} at once",
            name,
            rows[SERVED, callers][figure],
            rows[peer, callers][figure],
            figure.removeprefix("p50 ").removeprefix("p95 "),
            "> 1x" if peer == GENERATED else "none",
        )
        for peer, name in peers.items()
        for callers in CALLERS
        for figure in ("p50 ms", "p95 ms", "calls/s")
    ]
    facts = {"run": run.name, "items": len(recommender.run.catalogue.item_ids)}
    return claims, table("serve", claims, sizes=vars(sizes), data=facts, measured=measured)


def generate_decodes(config: Any) -> bool:
    """Whether Hugging Face's `generate` gives a model's own scores: it starts every decoder with
    the same token, takes no token for certain, and knows no prompt of titles."""
    starts, certain = getattr(config, "decoder_start", ""), getattr(config, "certain_tokens", "")
    return starts == "mask" and certain == "learned"


def _scores_by_generates_rule(recommender: Recommender, history: Sequence[str]) -> np.ndarray:
    """A list's scores where an item that ends at a beam is treated as `generate` does."""
    rows, _ = find_rows(recommender.run.catalogue, history)
    offsets, nobody = np.array([0, len(rows)]), np.array([-1])
    encoder = encode_histories(rows, offsets, nobody, recommender.run.layout)
    searcher, beam = recommender.searcher, recommender.beam
    lists = searcher.search(encoder.to(searcher.device), beam=beam, top=TOP, ends="ranked")
    return lists.scores[0]


@contextmanager
def _serving(command: list[str]) -> Iterator[Callable[[Sequence[str]], dict[str, Any]]]:
    """A function that asks a server of its own for one history's list; each thread that calls it
    keeps one connection open. `command`: a module and its arguments."""
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={name: value for name, value in os.environ.items() if name != "GENREC_TOKEN"},
        stdout=subprocess.PIPE,
        text=True,
    )
    own = threading.local()

    def request(history: Sequence[str]) -> dict[str, Any]:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        body, headers = (
            json.dumps({"history": history, "k": TOP}),
            {"Content-Type": "application/json"},
        )
        own.connection.request("POST", "/recommend", body, headers)
        answer = own.connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise ValueError(f"the server answers {answer.status}: {content[:200]!r}")
        found: dict[str, Any] = json.loads(content)["recommendations"][0]
        return found

    try:
        assert server.stdout is not None
        found = re.search(r" at http://127\.0\.0\.1:(\d+) ", server.stdout.readline())
        if found is None:
            raise ValueError("the server did not start: its own message says why")
        port = int(found[1])
        yield request
    finally:
        server.terminate()
        server.communicate()
