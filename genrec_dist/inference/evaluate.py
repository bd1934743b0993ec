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
from genrec_dist.config.paths import check_writable, training_state
from genrec_dist.data.layout import PromptLayout
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.protocol import Protocol, expected_users
from genrec_dist.evaluation.results import ResultsWriter
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.load import LoadedRun, check_numbering, check_split
from genrec_dist.inference.rank_users import WINDOW, Decoding, Window, rank_windows

SYSTEMS = {"items": ", item head", "hybrid": ", hybrid"}
"""What the names of systems that are not ranked by the decoder alone end in."""


def evaluate(
    run: LoadedRun,
    dataset: Dataset,
    split: Split,
    *,
    decoding: Decoding,
    trained_through: TrainedThrough = "n-2",
    users: str | dict[str, int] = "all",
    recipe: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
    window: int = WINDOW,
    out_dir: Path | None = None,
) -> dict[str, Any] | None:
    """Decode each user who has a target in the split once, score the lists, and write
    `metrics-SPLIT.json` and `topN-SPLIT.parquet`. Collective.

    Args:
        run: The model, of `load_run`.
        dataset: The data directory it was trained on.
        split: Which items are the targets.
        decoding: How lists are made; `top` is at least 20.
        trained_through: The last item of each user that training saw, for the protocol and for the
            graph and the baselines beside the result.
        users: Who is listed, as in `Protocol`.
        recipe: The run's recipe, for the metrics file.
        ranks: Who shares the work; None: this process alone.
        on_batch: Called with how many users have been decoded since the last call.
        window: Users whose lists rank 0 holds at a time.
        out_dir: Where to write; None: the run directory.

    Returns:
        The metrics on rank 0, None elsewhere.

    Raises:
        ValueError: The run has another numbering or split, lists are too short for the metrics, or
            ranks were started differently. An error of one rank is raised on all of them, and then
            nothing is written.
    """
    ranks = ranks or Ranks()
    view = dataset.sequences.history_and_target(split)
    hybrid, reads_titles = decoding.mode == "hybrid", isinstance(run.layout, PromptLayout)
    protocol = Protocol.of(
        dataset,
        trained_through=trained_through,
        exclude_history=decoding.exclude_history,
        beam=decoding.beam,
        decode=decoding.mode,
        users=users,
        item_weight=decoding.mixture.item_weight if hybrid and run.model.config.item_loss else None,
        graph=decoding.mixture.of_graph if hybrid else None,
    )
    history_scores = None
    if protocol.graph is not None:
        history_scores = HistoryScores.of(dataset, split, trained_through, decoding.mixture)
    started_with = ranks.all_gather_str(f"{dataset.info.sequences_hash} {decoding} {users}")

    def open_writer() -> ResultsWriter | None:
        check_numbering(run, dataset)
        check_split(run, dataset)
        check_writable(out_dir or run.path)
        if started_with[ranks.rank] != started_with[0]:
            raise ValueError(
                "not the data or the options of rank 0: "
                "start all ranks with one command and equal data"
            )
        if not ranks.is_main:
            return None
        writer = ResultsWriter(
            out_dir or run.path,
            system=("genrec, titles" if reads_titles else "genrec")
            + SYSTEMS.get(decoding.mode, ""),
            split=split,
            dataset=dataset,
            protocol=protocol,
            recipe=recipe,
            top=decoding.top,
        )
        return files.enter_context(writer)

    def write_window(found: Window) -> None:
        if writer is not None:
            writer.add(found.user_rows, found.items, found.scores)

    with contextlib.ExitStack() as files:
        writer = ranks.run_on_all(open_writer)
        start = time.perf_counter()
        windows = rank_windows(
            run.searcher, run.layout, view, expected_users(view.users, protocol), decoding, ranks,
            on_batch, window=window, history_scores=history_scores,
        )  # fmt: skip
        for found in windows:
            ranks.run_on_all(partial(write_window, found))
        seconds = time.perf_counter() - start

        def finish_writer() -> dict[str, Any] | None:
            if writer is None:
                return None
            return writer.finish(
                seconds,
                reference_scores(dataset, split, protocol, writer.expected),
                training=training_state(run.path),
            )

        return ranks.run_on_all(finish_writer)
