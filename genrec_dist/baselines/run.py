"""Running a baseline, or taking another system's lists, and writing metrics and lists."""

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
from genrec_dist.evaluation.given_lists import GivenLists, read_lists
from genrec_dist.evaluation.protocol import Protocol
from genrec_dist.evaluation.ranked_lists import Rule
from genrec_dist.evaluation.results import ResultsWriter, lists_name

if TYPE_CHECKING:
    from genrec_dist.baselines.sasrec.train import Epoch


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
        name: A baseline of `registry.BASELINES`, sasrec, bsarec, or a control: sasrec+knn,
            graph+text or sasrec+graph+text.
        dataset: The prepared data.
        split: Whose targets are ranked.
        out_dir: Where results go. sasrec and bsarec are trained into it, or taken from there.
        trained_through: The last position that is trained on.
        exclude_history: Leave the history out of the lists; None: where no target repeats.
        users: all, or a seeded sample as in `Protocol.users`.
        settings: `key=value` of knn, sasrec, bsarec or a control.
        on_epoch: Called after each epoch of sasrec or bsarec.

    Returns:
        The metrics. `seconds` in them are those of the lists, without training.
    """
    sequences, out = dataset.sequences, Path(out_dir)
    if exclude_history is None:
        exclude_history = exclude_history_default(sequences)
    recipe, graph, seconds = None, None, 0.0
    if name in ("sasrec", "bsarec") or name in registry.CONTROLS:
        # Imported here: they need torch, which the other baselines do without.
        from genrec_dist.baselines.sasrec import hybrid as sasrec_hybrid
        from genrec_dist.baselines.sasrec import model as sasrec_model
        from genrec_dist.baselines.sasrec import run as sasrec_run

        training = sasrec_run.Training(
            dataset,
            split,
            exclude_history,
            trained_through,
            on_epoch,
            "bsarec" if name == "bsarec" else "sasrec",
        )
        if name not in registry.CONTROLS:
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
        seconds += _add_lists(writer, rule)
        beside = registry.reference_scores(dataset, split, protocol, writer.expected)
        return writer.finish(seconds, beside)


def score_lists(
    path: str | Path,
    dataset: Dataset,
    split: Split,
    out_dir: str | Path,
    *,
    system: str | None = None,
    trained_through: TrainedThrough = "n-2",
    exclude_history: bool | None = None,
    seed: int | None = None,
) -> tuple[dict[str, Any], GivenLists]:
    """Write the results of lists that another system has made.

    Args:
        path: The file of lists, as `read_lists` reads it.
        dataset: The prepared data, whose ids the lists use.
        split: Whose targets are ranked.
        out_dir: Where results go.
        system: Its name in tables; None: the file's name without its ending.
        trained_through: The last position that the system has learned from.
        exclude_history: Refuse lists that hold the history; None: where no target repeats.
        seed: Of its training, for a comparison over seeds.

    Returns:
        The metrics, and the lists as they were read.

    Raises:
        DataError: One line with file, line and user, for a list that cannot be scored.
        ValueError: The file is the one that the results would replace.
    """
    path = Path(path)
    sequences = dataset.sequences
    if exclude_history is None:
        exclude_history = exclude_history_default(sequences)
    protocol = Protocol.of(
        dataset, exclude_history=exclude_history, trained_through=trained_through
    )
    with ResultsWriter(
        out_dir,
        system=system or path.name.partition(".")[0],
        split=split,
        dataset=dataset,
        protocol=protocol,
        recipe=None if seed is None else {"seed": seed},
    ) as writer:
        target = writer.out / lists_name(split, writer.top)
        if target.exists() and target.samefile(path):
            raise ValueError(f"{path}: the results would replace it: choose another --out")
        given = read_lists(path, sequences, split, writer.expected)
        if exclude_history:
            given.check_history_is_out(sequences, split)
        _add_lists(writer, given)
        beside = registry.reference_scores(dataset, split, protocol, writer.expected)
        origin = {**asdict(given.source), "shorter": given.shorter}
        return writer.finish(None, beside, lists=origin), given


def _add_lists(writer: ResultsWriter, rule: Rule) -> float:
    """Give the writer the lists of all users; returns the seconds that making them took."""
    seconds = 0.0
    for rows in windows(writer.expected):
        start = time.perf_counter()
        lists = rule(rows)
        seconds += time.perf_counter() - start
        writer.add(rows, lists.items_UN, lists.scores_UN, tied_beyond=lists.tied_beyond_U)
    return seconds
