"""Distributed beam evaluation: each user's top list exactly once, whatever the number of ranks."""

# U users, N list

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from genrec_shards.prepare import Dataset
from genrec_shards.sequences import Split, SplitView, TrainedThrough

from genrec_dist.baseline.training import check_trained_through
from genrec_dist.batch import Layout, encode_histories, ragged, target_batch
from genrec_dist.beam import TopItems, TrieSearcher
from genrec_dist.loss import target_loss
from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.results import Protocol, write_results
from genrec_dist.run import LoadedRun

TOP = 20
"""Length of the lists that are written and scored."""


@dataclass(frozen=True)
class Decoding:
    """How lists are made; the same for validation, evaluation and requests."""

    beam: int = 20
    top: int = TOP
    exclude_history: bool = True
    batch_size: int = 256


def rank_users(
    searcher: TrieSearcher,
    layout: Layout,
    view: SplitView,
    user_rows_U: np.ndarray,
    decoding: Decoding,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> TopItems:
    """Top items of these users after their histories, in the given order, the same on every rank.

    Batches are cut first, then dealt to ranks, so the lists do not depend on the number of ranks.
    """
    # Like lengths share a batch: short histories do not pay for long ones.
    order = np.argsort((view.ends - view.starts)[user_rows_U], kind="stable")
    chunks = [order[start : start + decoding.batch_size] for start in range(0, len(order), decoding.batch_size)]
    mine: list[tuple[np.ndarray, TopItems]] = []
    for chunk in chunks[rank::world_size]:
        mine.append((chunk, _rank_chunk(searcher, layout, view, user_rows_U[chunk], decoding)))
        if on_batch is not None:
            on_batch(len(chunk))
    return _assemble(_gather(mine, world_size), len(user_rows_U), decoding.top)


def _rank_chunk(
    searcher: TrieSearcher, layout: Layout, view: SplitView, user_rows_B: np.ndarray, decoding: Decoding
) -> TopItems:
    lengths_B = (view.ends - view.starts)[user_rows_B]
    flat, offsets = ragged(view.starts[user_rows_B], lengths_B)
    items = view.items[flat]
    encoder = encode_histories(items, offsets, user_rows_B, layout).to(searcher.device)
    # The whole history is excluded, also what the model's input had no room for.
    excluded = (np.repeat(np.arange(len(user_rows_B)), lengths_B), items) if decoding.exclude_history else None
    return searcher.search(encoder, beam=decoding.beam, top=decoding.top, excluded=excluded)


def _gather(mine: list[tuple[np.ndarray, TopItems]], world_size: int) -> list[tuple[np.ndarray, TopItems]]:
    if world_size == 1:
        return mine
    everyone: list[Any] = [None] * world_size
    try:
        dist.all_gather_object(everyone, mine)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"another rank has gone ({reason}): its own message says why, nothing was written") from None
    return [chunk for theirs in everyone for chunk in theirs]


def _assemble(chunks: list[tuple[np.ndarray, TopItems]], num_users: int, top: int) -> TopItems:
    items_UN = np.full((num_users, top), -1, np.int32)
    scores_UN = np.full((num_users, top), -np.inf, np.float32)
    seen_U = np.zeros(num_users, np.int64)
    for places, lists in chunks:
        items_UN[places], scores_UN[places] = lists.items, lists.scores
        seen_U[places] += 1
    if (seen_U != 1).any():
        raise RuntimeError(f"{(seen_U != 1).sum()} of {num_users} users were not ranked exactly once")
    return TopItems(items_UN, scores_UN)


@torch.inference_mode()
def history_loss(
    model: GenRecForConditionalGeneration, layout: Layout, view: SplitView, user_rows_U: np.ndarray
) -> float:
    """Cross-entropy a target token of these users' targets, the model as it stands."""
    total = tokens = 0.0
    for start in range(0, len(user_rows_U), 250):
        users_B = user_rows_U[start : start + 250]
        flat, offsets = ragged(view.starts[users_B], (view.ends - view.starts)[users_B])
        encoder = encode_histories(view.items[flat], offsets, users_B, layout)
        batch = target_batch(encoder, view.targets[users_B], layout).to(model.device)
        logits, labels = model.target_logits(batch.encoder, batch.encoder_row, batch.decoder_input_ids, batch.labels)
        total += float(target_loss(logits, labels, 1))
        tokens += batch.num_target_tokens
    return total / tokens


def evaluate(
    run: LoadedRun,
    dataset: Dataset,
    split: Split,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    recipe: dict[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any] | None:
    """Decode, gather, score and write `metrics-SPLIT.json` and `top20-SPLIT.parquet` into the run directory.

    Returns the metrics on rank 0, None elsewhere. Raises ValueError if the run speaks another numbering.
    """
    check_numbering(run, dataset)
    check_trained_through(split, trained_through)
    view = dataset.sequences.history_and_target(split)
    users_U = np.arange(dataset.sequences.num_users)
    start = time.perf_counter()
    lists = rank_users(
        run.searcher, run.layout, view, users_U, decoding, rank=rank, world_size=world_size, on_batch=on_batch
    )
    seconds = time.perf_counter() - start
    if rank != 0:
        return None
    protocol = Protocol.of(
        dataset,
        trained_through=trained_through,
        exclude_history=decoding.exclude_history,
        beam=decoding.beam,
        decode="exact",
    )
    return write_results(
        run.path,
        system="genrec",
        split=split,
        dataset=dataset,
        user_rows=users_U,
        lists_UN=lists.items,
        scores_UN=lists.scores,
        protocol=protocol,
        seconds=seconds,
        recipe=recipe,
    )


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


def process_group() -> tuple[int, int]:
    """(rank, world size) of a launched run, (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def best_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
