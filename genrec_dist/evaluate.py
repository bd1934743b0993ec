"""Distributed beam evaluation: each user's top list exactly once, the same whatever the number of ranks."""

# U users, B users of a batch, N list

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import Split, SplitView, TrainedThrough

from genrec_dist import mixture
from genrec_dist.baseline.knn import KnnSettings
from genrec_dist.batch import target_batch
from genrec_dist.beam import Mode, TopItems, TrieSearcher
from genrec_dist.graph import Graph
from genrec_dist.hybrid import Candidates
from genrec_dist.loss import target_loss
from genrec_dist.metrics import EMPTY, TOP, rank_histogram, target_ranks
from genrec_dist.mixture import Mixture
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.ranks import Ranks
from genrec_dist.results import Protocol, ResultsWriter
from genrec_dist.run import LoadedRun
from genrec_dist.text import EncoderInput, Layout, encode_histories, ragged

SYSTEMS = {"items": "genrec, item head", "hybrid": "genrec, hybrid"}
"""What systems are called that are not ranked by the decoder alone."""
WINDOW = 65_536
"""Users whose lists rank 0 holds at a time."""


@dataclass(frozen=True)
class Decoding:
    """How lists are made; the same for validation, evaluation and requests."""

    beam: int = 20
    """A beam narrower than `top` is widened to it."""
    top: int = TOP
    mode: Mode = "exact"
    exclude_history: bool = True
    batch_size: int = 512
    item_weight: float = 1.0
    """Of the item head in mode `hybrid`, where the model has one."""
    graph_weight: float = 0.0
    """Of the transition graph in mode `hybrid`."""
    epsilon: float = 0.1
    """As in `Mixture`."""
    graph: KnnSettings = field(default_factory=KnnSettings)
    """How the graph counts neighbours."""

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.item_weight, self.graph_weight, self.epsilon, self.graph)


@dataclass(frozen=True)
class Window:
    """The lists of some users, on rank 0; of none on the others."""

    user_rows: np.ndarray
    """int64 [U]."""
    items: np.ndarray
    """int32 [U, N] item rows as in `TopItems`."""
    scores: np.ndarray
    """float32 [U, N]."""


def rank_windows(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    on_batch: Callable[[int], None] | None = None,
    *,
    window: int = WINDOW,
    graph: Graph | None = None,
) -> Iterator[Window]:
    """Top items of these users after their histories, window by window in the given order. Collective.

    What shares a batch is a function of users, histories, batch size and `window` alone; batches are dealt to the ranks in turn,
    so no list depends on the number of ranks. All ranks get equally many windows. `on_batch` hears, on each rank, how many users
    all ranks together have done since. `graph`: of mode `hybrid`. Raises on all ranks where one fails. What may fail in between,
    such as writing, belongs into `Ranks.together`, or the others would not hear of it.
    """
    times_seen = np.zeros(len(view.starts) if ranks.is_main else 0, np.uint8)
    for start in range(0, len(user_rows_U), window):
        rows_U = user_rows_U[start : start + window]
        lists = _WindowLists(rows_U if ranks.is_main else rows_U[:0], decoding.top)
        _rank_window(searcher, layout, view, rows_U, decoding, ranks, lists, on_batch, graph)
        ranks.together(partial(check_once, lists.times_seen_U))
        np.add.at(times_seen, lists.rows_U, 1)
        yield Window(lists.rows_U, lists.items_UN, lists.scores_UN)
    ranks.together(lambda: check_once(times_seen[user_rows_U]) if ranks.is_main else None)


def _rank_window(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
    lists: _WindowLists,
    on_batch: Callable[[int], None] | None,
    graph: Graph | None,
) -> None:
    """Decode a window's users, this rank its share of the batches, and fill rank 0's `lists`."""
    batches = cut_batches((view.ends - view.starts)[rows_U], decoding.batch_size)
    for first in range(0, len(batches), ranks.size):
        here = batches[first : first + ranks.size]
        # A rank whose turn does not come sends a batch of nobody.
        places_B = here[ranks.rank] if ranks.rank < len(here) else np.empty(0, np.int64)
        parcel, error = _parcel(min(decoding.batch_size, len(rows_U)), decoding.top), None
        try:
            if len(places_B):
                _pack(parcel, places_B, rank_batch(searcher, layout, view, rows_U[places_B], decoding, graph))
        except Exception as raised:
            error = raised
        for theirs in ranks.gather(torch.from_numpy(parcel), error):
            lists.take(theirs.numpy())
        if on_batch is not None:
            on_batch(sum(map(len, here)))


class _WindowLists:
    """A window's lists as they come in."""

    def __init__(self, rows_U: np.ndarray, top: int):
        self.rows_U = rows_U.astype(np.int64)
        self.items_UN = np.full((len(rows_U), top), EMPTY, np.int32)
        self.scores_UN = np.full((len(rows_U), top), -np.inf, np.float32)
        self.times_seen_U = np.zeros(len(rows_U), np.int64)

    def take(self, parcel: np.ndarray) -> None:
        places_B, items_BN, scores_BN = _unpack(parcel)
        self.items_UN[places_B], self.scores_UN[places_B] = items_BN, scores_BN
        np.add.at(self.times_seen_U, places_B, 1)


def check_once(times_seen_U: np.ndarray) -> None:
    """Raise RuntimeError unless each user was seen once."""
    wrong = int((times_seen_U != 1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {len(times_seen_U)} users were not ranked exactly once")


def _parcel(batch_size: int, top: int) -> np.ndarray:
    """int32 [B, 1 + 2 N], of one size for all ranks: place in the window or -1, items, the bits of the scores."""
    return np.full((batch_size, 1 + 2 * top), -1, np.int32)


def _pack(parcel: np.ndarray, places_B: np.ndarray, lists: TopItems) -> None:
    scores_BN = np.ascontiguousarray(lists.scores, np.float32).view(np.int32)
    parcel[: len(places_B)] = np.concatenate([places_B[:, None], lists.items, scores_BN], axis=1)


def _unpack(parcel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places [B], items [B, N], scores [B, N]) of those who are in it."""
    filled = parcel[parcel[:, 0] >= 0]
    items_BN, scores_BN = np.split(filled[:, 1:], 2, axis=1)
    return filled[:, 0], items_BN, np.ascontiguousarray(scores_BN).view(np.float32)


def cut_batches(lengths_U: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Places of users, batch by batch: like lengths share a batch, so that short histories do not pay for long ones."""
    order = np.argsort(lengths_U, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class _Asked:
    """The histories of a batch as a searcher takes them."""

    encoder: EncoderInput
    excluded: tuple[np.ndarray, np.ndarray] | None
    shares_BN: torch.Tensor | None


def _asked(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    graph: Graph | None,
) -> _Asked:
    lengths_B = (view.ends - view.starts)[user_rows_B]
    flat, offsets = ragged(view.starts[user_rows_B], lengths_B)
    items = view.items[flat]
    # The whole history is excluded, also what the model's input had no room for.
    excluded = (np.repeat(np.arange(len(user_rows_B)), lengths_B), items) if decoding.exclude_history else None
    return _Asked(
        encode_histories(items, offsets, user_rows_B, layout).to(searcher.device),
        excluded,
        None if graph is None else graph.shares(items, offsets),
    )


def rank_batch(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_B: np.ndarray,
    decoding: Decoding,
    graph: Graph | None = None,
) -> TopItems:
    """Top items of the users of one batch."""
    asked = _asked(searcher, layout, view, user_rows_B, decoding, graph)
    try:
        return searcher.search(
            asked.encoder,
            beam=decoding.beam,
            top=decoding.top,
            mode=decoding.mode,
            excluded=asked.excluded,
            mixture=decoding.mixture if decoding.mode == "hybrid" else None,
            shares_BN=asked.shares_BN,
        )
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{len(user_rows_B)} users at once, beam {decoding.beam}, do not fit into the memory of {searcher.device}: "
            "lower --batch-size"
        ) from None


def target_histogram(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    ranks: Ranks,
) -> np.ndarray:
    """int64 [21], as `rank_histogram`, of these users' targets; the ranks share the batches, and no list travels. Collective."""

    batches = cut_batches((view.ends - view.starts)[user_rows_U], decoding.batch_size)

    def mine() -> np.ndarray:
        counts = np.zeros(TOP + 1, np.int64)
        for places_B in batches[ranks.rank :: ranks.size]:
            rows_B = user_rows_U[places_B]
            lists = rank_batch(searcher, layout, view, rows_B, decoding)
            counts += rank_histogram(target_ranks(lists.items, view.targets[rows_B]))
        return counts

    total: np.ndarray = np.sum(ranks.exchange(ranks.together(mine).tolist()), axis=0)
    assert total.sum() == len(user_rows_U)
    return total


@torch.inference_mode()
def history_loss(
    model: GenRecForConditionalGeneration,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    ranks: Ranks,
    batch_size: int = 250,
) -> float:
    """Cross-entropy a target token of these users' targets, the model as it stands. Collective.

    The ranks share the batches, and the sum of their sums is exact before it is rounded: the same for any number of ranks.
    """
    batches = [user_rows_U[start : start + batch_size] for start in range(0, len(user_rows_U), batch_size)]

    def mine() -> list[tuple[float, int]]:
        return [_batch_loss(model, layout, view, users_B) for users_B in batches[ranks.rank :: ranks.size]]

    sums = ranks.together(mine)
    sums += [(0.0, 0)] * (-(-len(batches) // ranks.size) - len(sums))
    losses, tokens = zip(*sums, strict=True)
    bits = np.array(losses, np.float64).view(np.int64)
    everyone = np.array(ranks.exchange([*bits.tolist(), *tokens]), np.int64).reshape(ranks.size, 2, -1)
    total = math.fsum(np.ascontiguousarray(everyone[:, 0]).view(np.float64).flatten())
    return total / int(everyone[:, 1].sum())


def _batch_loss(
    model: GenRecForConditionalGeneration, layout: Layout, view: SplitView, users_B: np.ndarray
) -> tuple[float, int]:
    """(sum of the cross-entropies, target tokens) of one batch."""
    flat, offsets = ragged(view.starts[users_B], (view.ends - view.starts)[users_B])
    encoder = encode_histories(view.items[flat], offsets, users_B, layout)
    batch = target_batch(encoder, view.targets[users_B], layout).to(model.device)
    logits, labels = model.target_logits(batch.encoder, batch.encoder_row, batch.decoder_input_ids, batch.labels)
    return float(target_loss(logits, labels, 1)), batch.num_target_tokens


def evaluate(
    run: LoadedRun,
    dataset: Dataset,
    split: Split,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    recipe: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
    window: int = WINDOW,
    out_dir: Path | None = None,
) -> dict[str, Any] | None:
    """Decode, score and write `metrics-SPLIT.json` and `topN-SPLIT.parquet` into the run directory or `out_dir`, window by
    window: the lists of each user who has a target in the split, once. Collective.

    Returns the metrics on rank 0, None elsewhere. Raises ValueError if the run speaks another numbering; an error of one rank on
    all of them, and then nothing is written.
    """
    ranks = ranks or Ranks()
    view = dataset.sequences.history_and_target(split)
    users_U = view.users
    protocol = Protocol.of(
        dataset,
        trained_through=trained_through,
        exclude_history=decoding.exclude_history,
        beam=decoding.beam,
        decode=decoding.mode,
        item_weight=decoding.item_weight if decoding.mode == "hybrid" and run.model.config.item_loss else None,
        graph=decoding.mixture.of_graph if decoding.mode == "hybrid" else None,
    )
    graph = None
    if protocol.graph is not None:
        graph = Graph.of(dataset.sequences, split, trained_through, decoding.graph)

    alike = ranks.texts(f"{dataset.info.sequences_hash} {decoding}")

    def opened() -> ResultsWriter | None:
        check_numbering(run, dataset)
        check_split(run, dataset)
        if alike[ranks.rank] != alike[0]:
            raise ValueError("not the data or the options of rank 0: start all ranks with one command and equal data")
        if not ranks.is_main:
            return None
        writer = ResultsWriter(
            out_dir or run.path,
            system=SYSTEMS.get(decoding.mode, "genrec"),
            split=split,
            dataset=dataset,
            protocol=protocol,
            recipe=recipe,
            top=decoding.top,
        )
        return files.enter_context(writer)

    def add(found: Window) -> None:
        if writer is not None:
            writer.add(found.user_rows, found.items, found.scores)

    with contextlib.ExitStack() as files:
        writer = ranks.together(opened)
        start = time.perf_counter()
        for found in rank_windows(
            run.searcher, run.layout, view, users_U, decoding, ranks, on_batch, window=window, graph=graph
        ):  # fmt: skip
            ranks.together(partial(add, found))
        seconds = time.perf_counter() - start
        return ranks.together(lambda: None if writer is None else writer.finish(seconds))


def tune_mixture(
    run: LoadedRun,
    dataset: Dataset,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> mixture.Choice:
    """The weights of mode `hybrid` with the best NDCG@10 on validation, its users; on rank 0 written to the run's `hybrid.json`.

    Of `decoding` beam, history exclusion and the graph's settings are used. What the parts say of the candidates is computed once
    and mixed in all ways of the grid. Collective. Raises ValueError if training saw the validation targets.
    """
    ranks = ranks or Ranks()
    ranks.together(partial(check_numbering, run, dataset))
    ranks.together(partial(check_split, run, dataset))
    graph = ranks.together(lambda: Graph.of(dataset.sequences, "validation", trained_through, decoding.graph))
    view = dataset.sequences.history_and_target("validation")
    has_head = bool(run.model.config.item_loss)
    tried = mixture.grid(mixture.ITEM_WEIGHTS if has_head else (1.0,), decoding.graph)
    batches = [
        view.users[places_B] for places_B in cut_batches((view.ends - view.starts)[view.users], decoding.batch_size)
    ]

    def mine() -> np.ndarray:
        counts_G = np.zeros((len(tried), TOP + 1), np.int64)
        for rows_B in batches[ranks.rank :: ranks.size]:
            asked = _asked(run.searcher, run.layout, view, rows_B, decoding, graph)
            found = run.searcher.candidates(
                asked.encoder, beam=max(decoding.beam, TOP), excluded=asked.excluded, shares_BN=asked.shares_BN
            )
            targets_B = torch.from_numpy(view.targets[rows_B].astype(np.int64)).to(run.searcher.device)
            for place, mixed in enumerate(tried):
                counts_G[place] += rank_histogram(_ranks_of(targets_B, found, mixed, run.searcher))
            if on_batch is not None:
                on_batch(len(rows_B))
        return counts_G

    parts = ranks.exchange(ranks.together(mine).flatten().tolist())
    choice = mixture.choose(tried, np.sum(parts, axis=0).reshape(len(tried), -1))
    if ranks.is_main:
        mixture.save(choice, run.path, mixture_origin(dataset, decoding, trained_through))
    return choice


def mixture_origin(dataset: Dataset, decoding: Decoding, trained_through: TrainedThrough) -> dict[str, Any]:
    """What chosen weights are good for."""
    return {
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": decoding.exclude_history,
    }


def mixed_decoding(
    run: LoadedRun,
    dataset: Dataset,
    decoding: Decoding,
    trained_through: TrainedThrough,
    *,
    item_weight: float | None = None,
    graph_weight: float | None = None,
    overrides: list[str] | None = None,
    anew: bool = False,
) -> Decoding:
    """The decoding with the mixture that was chosen for the run (the defaults where none was, or `anew`), changed in what is given.

    `overrides`: `epsilon=value`, or `key=value` of the graph's `KnnSettings`. Raises ValueError for what does not fit, and where
    the chosen weights are of other data, another training or another exclusion of the history.
    """
    origin = mixture_origin(dataset, decoding, trained_through)
    chosen = (None if anew else mixture.load(run.path, origin)) or Mixture()
    mixed = mixture.changed(chosen, item_weight, graph_weight, overrides)
    return replace(
        decoding,
        item_weight=mixed.item_weight,
        graph_weight=mixed.graph_weight,
        epsilon=mixed.epsilon,
        graph=mixed.graph,
    )


def _ranks_of(targets_B: torch.Tensor, found: Candidates, mixed: Mixture, searcher: TrieSearcher) -> np.ndarray:
    """int64 [B], 1 = first, 0 = none of the first 20: as the lists would have it, ties by node included."""
    scores_BC, target_B1 = found.mixed(mixed), targets_B[:, None]
    is_target_BC = found.items_BC == target_B1
    target_score_B1 = scores_BC.masked_fill(~is_target_BC, -torch.inf).amax(1, keepdim=True)
    nodes_BC, node_B1 = searcher.item_node[found.items_BC], searcher.item_node[target_B1]
    above_BC = (scores_BC > target_score_B1) | ((scores_BC == target_score_B1) & (nodes_BC < node_B1))
    ranks_B = above_BC.sum(1) + 1
    listed_B = torch.isfinite(target_score_B1[:, 0]) & (ranks_B <= TOP)
    return ranks_B.masked_fill(~listed_B, 0).cpu().numpy()


def check_numbering(run: LoadedRun, dataset: Dataset) -> None:
    """Raise ValueError if the run was trained on other codes, or on equal codes that stand for other ids."""
    expected = run.model.config.numbering_hash
    found = dataset.numbering.numbering_hash()
    if expected != found:
        raise ValueError(
            f"{run.path} speaks numbering {expected[:12]}, {dataset.path} has {found[:12]}: "
            "give --data the directory the run was trained on"
        )
    # Codes are 1..N of a seeded order: two catalogues of equal size share them.
    for kind, ours, theirs in (
        ("item", run.catalogue.item_ids, dataset.sequences.item_ids),
        ("user", run.catalogue.user_ids, dataset.sequences.user_ids),
    ):
        if ours != theirs:
            mine, other = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
            raise ValueError(
                f"{run.path} knows {kind} {mine!r} where {dataset.path} has {other!r}: "
                "give --data the directory the run was trained on"
            )


def check_split(run: LoadedRun, dataset: Dataset) -> None:
    """Raise ValueError where what the run has learned may be what is asked here."""
    learned, asked = run.model.config.split, dataset.info.split_told
    if learned != asked:
        raise ValueError(
            f"{run.path} was trained under the split {learned}, {dataset.path} has {asked}: it may have learned what is held out "
            "here; give --data of its own split"
        )


def best_device() -> torch.device:
    """This process's GPU, or the CPU where there is none or the launcher wants it."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    # A launcher either shows each process one GPU, or all of them.
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
