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

from genrec_dist.baselines import knn, registry
from genrec_dist.data.item_graph import knn_settings
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
    """Make the lists of a baseline and write its results.

    Args:
        name: A baseline of `registry.BASELINES`, sasrec, or a control: sasrec+knn, graph+text or
            sasrec+graph+text.
        dataset: The prepared data.
        split: Whose targets are ranked.
        out_dir: Where results go. sasrec is trained into it, or taken from there.
        trained_through: The last position that is trained on.
        exclude_history: Leave the history out of the lists; None: where no target repeats.
        users: all, or a seeded sample as in `Protocol.users`.
        settings: `key=value` of knn, sasrec or a control.
        on_epoch: Called after each epoch of sasrec.

    Returns:
        The metrics. `seconds` in them are those of the lists, without the training of sasrec.
    """
    sequences, out = dataset.sequences, Path(out_dir)
    if exclude_history is None:
        exclude_history = exclude_history_default(sequences)
    recipe, graph, seconds = None, None, 0.0
    if name == "sasrec" or name in registry.CONTROLS:
        # Imported here: they need torch, which the other baselines do without.
        from genrec_dist.baselines import sasrec_hybrid, sasrec_model, sasrec_run

        training = sasrec_run.Training(
            dataset, split, exclude_history, trained_through, on_epoch=on_epoch
        )
        if name == "sasrec":
            run = sasrec_run.open_or_train(out, training, settings)
            recipe = run.recipe
            rule = sasrec_model.rule_of(
                run.model, sequences, split, exclude_history=exclude_history
            )
        else:
            control = sasrec_hybrid.open_or_make(name, out, training, settings)
            recipe, graph = control.recipe, control.mixture.of_graph
            rule = sasrec_hybrid.rule_of(control, dataset, split, exclude_history=exclude_history)
    else:
        start = time.perf_counter()
        options = {"exclude_history": exclude_history, "trained_through": trained_through}
        if name == "knn":
            chosen = knn_settings(settings)
            recipe = asdict(chosen)
            rule = knn.fit(sequences, split, settings=chosen, **options)  # type: ignore[arg-type]
        else:
            codes = dataset.numbering.item_codes
            rule = registry.fit(name, sequences, codes, split, **options)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
    # What the rule does: counting always leaves out the history, and repeat lists nothing else.
    excluded = {"counting": True, "repeat": None}.get(name, exclude_history)
    protocol = Protocol.of(
        dataset,
        exclude_history=excluded,
        trained_through=trained_through,
        users=users,
        graph=graph,
    )
    with ResultsWriter(
        out, system=name, split=split, dataset=dataset, protocol=protocol, recipe=recipe
    ) as writer:
        for rows in windows(writer.expected):
            start = time.perf_counter()
            lists = rule(rows)
            seconds += time.perf_counter() - start
            writer.add(rows, lists.items_UN, lists.scores_UN, tied_beyond=lists.tied_beyond_U)
        beside = registry.reference_scores(dataset, split, protocol, writer.expected)
        return writer.finish(seconds, beside)
