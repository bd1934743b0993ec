"""Running a baseline and writing its metrics and lists."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec_shards.dataset import Dataset
from genrec_shards.histories import exclude_history_default, windows
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.baselines import knn
from genrec_dist.baselines import registry as baseline
from genrec_dist.data.item_graph import knn_settings
from genrec_dist.evaluation.ranked_lists import Rule
from genrec_dist.evaluation.results import Protocol, ResultsWriter

if TYPE_CHECKING:
    from genrec_dist.baselines.sasrec_train import Epoch


def run_baseline(
    name: str,
    dataset: Dataset,
    split: Split,
    out_dir: str | Path,
    *,
    trained_through: TrainedThrough = "n-2",
    exclude_history: bool | None = None,
    users: str | dict[str, int] = "all",
    settings: list[str] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> dict[str, Any]:
    """Make the lists of a baseline and write its results; `exclude_history=None`: on where no
    target repeats.

    The protocol says what the rule does: counting always leaves out the history, to repeat the
    question does not apply. `settings`: `key=value` of knn and sasrec. sasrec is trained into
    `out_dir` or taken from there; what that takes is not in `seconds`."""
    if exclude_history is None:
        exclude_history = exclude_history_default(dataset.sequences)
    told = {"counting": True, "repeat": None}.get(name, exclude_history)
    rule, recipe, seconds, graph = _learned(
        name, dataset, split, Path(out_dir), trained_through, exclude_history, settings, on_epoch
    )  # fmt: skip
    protocol = Protocol.of(
        dataset, exclude_history=told, trained_through=trained_through, users=users, graph=graph
    )
    with ResultsWriter(
        out_dir, system=name, split=split, dataset=dataset, protocol=protocol, recipe=recipe
    ) as writer:  # fmt: skip
        for rows in windows(writer.expected):
            start = time.perf_counter()
            lists = rule(rows)
            seconds += time.perf_counter() - start
            writer.add(rows, lists.items_UN, lists.scores_UN, tied_beyond=lists.tied_beyond_U)
        return writer.finish(
            seconds, baseline.reference_scores(dataset, split, protocol, writer.expected)
        )


def _learned(
    name: str,
    dataset: Dataset,
    split: Split,
    out: Path,
    trained_through: TrainedThrough,
    exclude_history: bool,
    settings: list[str] | None,
    on_epoch: Callable[[Epoch], None] | None,
) -> tuple[Rule, dict[str, Any] | None, float, dict[str, Any] | None]:
    """(the baseline, ready to make lists; its settings; seconds that belong to the lists; the
    protocol's `graph`)."""
    sequences = dataset.sequences
    if name == "sasrec":
        # Brings torch along, which the rules do without.
        from genrec_dist.baselines.sasrec_model import rule_of
        from genrec_dist.baselines.sasrec_run import open_or_train

        found = open_or_train(
            out, dataset, split, exclude_history=exclude_history, trained_through=trained_through,
            overrides=settings, on_epoch=on_epoch,
        )  # fmt: skip
        return (
            rule_of(found.model, sequences, split, exclude_history=exclude_history),
            found.recipe,
            0.0,
            None,
        )
    if name == "sasrec+knn":
        from genrec_dist.baselines import sasrec_hybrid as sasrec_knn

        control = sasrec_knn.open_or_make(
            out, dataset, split, exclude_history=exclude_history, trained_through=trained_through,
            overrides=settings, on_epoch=on_epoch,
        )  # fmt: skip
        lists_of = sasrec_knn.rule_of(control, dataset, split, exclude_history=exclude_history)
        return lists_of, control.recipe, 0.0, control.mixture.of_graph
    start = time.perf_counter()
    if name == "knn":
        chosen = knn_settings(settings)
        rule = knn.fit(
            sequences, split, exclude_history=exclude_history, trained_through=trained_through, settings=chosen
        )  # fmt: skip
        return rule, asdict(chosen), time.perf_counter() - start, None
    rule = baseline.fit(
        name, sequences, dataset.numbering.item_codes, split,
        exclude_history=exclude_history, trained_through=trained_through,
    )  # fmt: skip
    return rule, None, time.perf_counter() - start, None
