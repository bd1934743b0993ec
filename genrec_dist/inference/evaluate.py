"""Distributed beam evaluation: each user's top list exactly once, the same whatever the number of
ranks."""

# U users, B users of a batch, N list

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from genrec_shards.dataset import Dataset
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.baselines.registry import reference_scores
from genrec_dist.data.item_graph import Graph
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.results import Protocol, ResultsWriter
from genrec_dist.inference.load import LoadedRun, check_numbering, check_split
from genrec_dist.inference.rank_users import WINDOW, Decoding, Window, rank_windows

SYSTEMS = {"items": "genrec, item head", "hybrid": "genrec, hybrid"}
"""What systems are called that are not ranked by the decoder alone."""


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
    """Decode, score and write `metrics-SPLIT.json` and `topN-SPLIT.parquet` into the run directory
    or `out_dir`, window by window: the lists of each user who has a target in the split, once.
    Collective.

    Returns the metrics on rank 0, None elsewhere. Raises ValueError if the run speaks another
    numbering; an error of one rank on all of them, and then nothing is written."""
    ranks = ranks or Ranks()
    view = dataset.sequences.history_and_target(split)
    users_U = view.users
    protocol = Protocol.of(
        dataset,
        trained_through=trained_through,
        exclude_history=decoding.exclude_history,
        beam=decoding.beam,
        decode=decoding.mode,
        item_weight=decoding.item_weight
        if decoding.mode == "hybrid" and run.model.config.item_loss
        else None,
        graph=decoding.mixture.of_graph if decoding.mode == "hybrid" else None,
    )
    graph = None
    if protocol.graph is not None:
        graph = Graph.of(dataset.sequences, split, trained_through, decoding.graph)

    alike = ranks.all_gather_str(f"{dataset.info.sequences_hash} {decoding}")

    def opened() -> ResultsWriter | None:
        check_numbering(run, dataset)
        check_split(run, dataset)
        if alike[ranks.rank] != alike[0]:
            raise ValueError(
                "not the data or the options of rank 0: start all ranks with one command and equal data"
            )
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
        writer = ranks.run_on_all(opened)
        start = time.perf_counter()
        for found in rank_windows(
            run.searcher, run.layout, view, users_U, decoding, ranks, on_batch, window=window, graph=graph
        ):  # fmt: skip
            ranks.run_on_all(partial(add, found))
        seconds = time.perf_counter() - start

        def finish() -> dict[str, Any] | None:
            if writer is None:
                return None
            beside = reference_scores(dataset, split, protocol, writer.expected)
            return writer.finish(seconds, beside)

        return ranks.run_on_all(finish)
