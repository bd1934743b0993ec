"""kNN's settings chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import scipy.sparse as sp
from genrec_shards.histories import histories, sample_users
from genrec_shards.sequences import Sequences
from genrec_shards.splits import TrainedThrough

from genrec_dist.baselines import knn
from genrec_dist.data.item_graph import KnnSettings, forward_pairs, scaled_weights
from genrec_dist.evaluation.metrics import as_written, metrics_from_histogram, rank_histogram

VALUES: dict[str, tuple[float, ...]] = {
    "window": (1, 2, 3, 6, 10, 20),
    "backward": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    "decay": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    "recent": (1, 2, 3, 5, 10, 20, 50),
    "smoothing": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "out_power": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    "in_power": (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75),
}
"""What is tried for each setting."""
DRAWN = 24
"""Settings drawn at random, before the best of them is changed in one value at a time."""
ROUNDS = 2
"""Most passes over the values next to those of the best settings."""
MOST_USERS = 4000
"""Validation users that are scored, a seeded sample."""


@dataclass(frozen=True)
class TunedKnn:
    settings: KnnSettings
    ndcg: float
    """NDCG@10 of the validation users that were scored."""
    tried: int

    def __str__(self) -> str:
        """What `--set` takes, and how it was chosen."""
        values = " ".join(f"{key}={getattr(self.settings, key):g}" for key in VALUES)
        return (
            f"knn's settings, the best of {self.tried} on validation "
            f"(NDCG@10 {as_written(self.ndcg)}): {values}"
        )


def tune_knn(
    sequences: Sequences,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    seed: int = 0,
    on_try: Callable[[int, float], None] | None = None,
) -> TunedKnn:
    """The settings with the best NDCG@10 on validation: the defaults, settings drawn at random, and
    then the best of these changed in one value at a time to its neighbours in `VALUES`.

    Args:
        sequences: The data.
        exclude_history: Leave the history out of the lists. Users whose target repeats it are then
            not scored.
        trained_through: The last position that neighbours are counted in.
        seed: Of the draws and of the sample of users.
        on_try: Called after each try with its number and NDCG@10.

    Raises:
        ValueError: If training saw the validation targets.
    """
    users = sequences.history_and_target("validation").users
    users = users[sample_users(len(users), MOST_USERS, seed)]
    past = histories(sequences, "validation", users)
    if exclude_history:
        new = ~past.holds(np.arange(past.num_users), past.targets_U)
        users, targets_U = users[new], past.targets_U[new]
    else:
        targets_U = past.targets_U
    pairs: dict[int, sp.csr_matrix] = {}
    scores: dict[KnnSettings, float] = {}

    def score(settings: KnnSettings) -> float:
        if settings not in scores:
            if settings.window not in pairs:
                pairs[settings.window] = forward_pairs(sequences, trained_through, settings.window)
            weights_II = scaled_weights(pairs[settings.window], settings)
            rule = knn.rule_of(weights_II, sequences, "validation", settings, exclude_history)
            histogram = rank_histogram(rule(users).ranks(targets_U))
            scores[settings] = metrics_from_histogram(histogram)["NDCG@10"]
            if on_try is not None:
                on_try(len(scores), scores[settings])
        return scores[settings]

    best = max([KnnSettings(), *drawn(seed)], key=score)
    for _ in range(ROUNDS):
        before = best
        for key in VALUES:
            best = max([best, *beside(best, key)], key=score)
        if best == before:
            break
    return TunedKnn(best, scores[best], len(scores))


def drawn(seed: int) -> Iterator[KnnSettings]:
    """`DRAWN` settings, the same ones on every machine."""
    for number in range(DRAWN):
        # Of Python's generator only `random` is promised to stay as it is.
        dice = Random(f"{seed} {number}")
        values: dict[str, Any] = {
            key: known[int(dice.random() * len(known))] for key, known in VALUES.items()
        }
        yield KnnSettings(**values)


def beside(settings: KnnSettings, key: str) -> Iterator[KnnSettings]:
    """The settings with the next smaller and the next larger known value of a key."""
    value, known = getattr(settings, key), VALUES[key]
    smaller = [other for other in known if other < value]
    larger = [other for other in known if other > value]
    for other in (*smaller[-1:], *larger[:1]):
        changes: dict[str, Any] = {key: other}
        yield replace(settings, **changes)
