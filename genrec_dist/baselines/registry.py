"""The baselines that learn little or nothing, by name, and their scores beside every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.histories import exclude_history_default, histories, training_counts, windows
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.baselines import counting, knn, popularity, repeat
from genrec_dist.evaluation.list_counts import Tally
from genrec_dist.evaluation.protocol import Protocol
from genrec_dist.evaluation.ranked_lists import Rule

BASELINES: dict[str, Callable[..., Rule]] = {
    "popularity": popularity.fit,
    "counting": counting.fit,
    "repeat": repeat.fit,
    "knn": knn.fit,
}

CONTROLS = ("sasrec+knn", "graph+text", "sasrec+graph+text")
"""What hybrid is compared with (`sasrec_hybrid.py`): other mixtures of its parts."""

BESIDE = ("counting", "popularity", "knn")
"""Whose scores are in every metrics file."""


def fit(
    name: str,
    sequences: Sequences,
    codes: list[str],
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
) -> Rule:
    """The baseline `name`, ready to make top-20 lists of any user rows. Raises ValueError for an
    unknown name."""
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: choose one of {', '.join(BASELINES)}")
    more = {"codes": codes} if name == "counting" else {}
    return BASELINES[name](
        sequences, split, exclude_history=exclude_history, trained_through=trained_through, **more
    )


def reference_scores(
    dataset: Dataset,
    split: Split,
    protocol: Protocol,
    users: np.ndarray | range,
    names: Sequence[str] = BESIDE,
) -> dict[str, dict[str, Any] | None]:
    """Metrics of baselines (`Tally.metrics`) under the protocol of a result.

    Args:
        dataset: The prepared data.
        split: Whose targets are ranked.
        protocol: Of the result; where it does not say whether lists leave out the history, the
            data's default holds.
        users: Exactly the user rows of the result; they are taken window by window.
        names: Of `BASELINES`.

    Returns:
        Metrics by baseline. counting is None where the codes are not whole numbers: the rule does
        not apply.
    """
    sequences, codes = dataset.sequences, dataset.numbering.item_codes
    exclude_history, through = protocol.exclude_history, protocol.trained_through
    if exclude_history is None:
        exclude_history = exclude_history_default(sequences)
    counts_I = training_counts(sequences, through)
    scores: dict[str, dict[str, Any] | None] = {}
    for name in names:
        if name == "counting" and counting.whole_numbers(codes) is None:
            scores[name] = None
            continue
        options = {"exclude_history": exclude_history, "trained_through": through}
        rule = fit(name, sequences, codes, split, **options)  # type: ignore[arg-type]
        tally = Tally(counts_I)
        for rows in windows(users):
            past, lists = histories(sequences, split, rows), rule(rows)
            ranks_U = lists.ranks(past.targets_U)
            tally.add(lists.items_UN, ranks_U, past.targets_U, past.lengths_U)
        scores[name] = tally.metrics()
    return scores
