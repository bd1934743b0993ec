"""How likely the next item is one that the user has taken before."""

# B users, N items, E entries: the distinct items of each history; F features

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch
from genrec_shards.histories import training_windows
from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.sequences import Sequences, flat_ranges, offsets_of
from genrec_shards.splits import TrainedThrough
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

MOST_ITEMS = 2_000_000
"""Items of all histories that are fitted, a sample of the prefixes of the training parts."""
MOST_RECENT = 256
"""Items at the end of a history that are fitted."""
PENALTY = 1e-4
"""Of the squared weights, per history."""
MOST_REPEATED = 0.99
"""Largest probability that the next item is any of the history's."""
_STREAM = 0x4E9E


@dataclass(frozen=True)
class RepeatModel:
    """A logistic regression: log-odds that the next item is a certain item of the history."""

    intercept: float = 0.0
    age: float = 0.0
    """Per log(1 + items since it was last taken); 0 items: it is the last one."""
    is_last: float = 0.0
    """Added where it is the last one."""
    count: float = 0.0
    """Per log of how often the history has it."""
    length: float = 0.0
    """Per log of the history's length."""
    user_rate: float = 0.0
    """Per log of (repeats in the history + 1/2) / (its distinct items + 2)."""

    def probabilities(self, items: np.ndarray, offsets: np.ndarray, num_items: int) -> Tensor:
        """float64 [B, N], rows that sum to one: each item of the history has its probability, the
        others share what is left equally.

        Args:
            items: int [total], item rows, history after history, oldest first.
            offsets: int64 [B + 1]; `items[offsets[b]:offsets[b + 1]]` is a history.
            num_items: N.
        """
        users_E, items_E, features_EF = history_features(items, offsets, num_items)
        prob_E = expit(features_EF @ np.array(astuple(self)))
        num_users = len(offsets) - 1
        sums_B = np.bincount(users_E, prob_E, num_users)
        scale_B = MOST_REPEATED / np.maximum(sums_B, MOST_REPEATED)
        left_B = 1 - sums_B * scale_B
        others_B = np.maximum(num_items - np.bincount(users_E, minlength=num_users), 1)
        prob_BN = np.repeat((left_B / others_B)[:, None], num_items, axis=1)
        prob_BN[users_E, items_E] = prob_E * scale_B[users_E]
        return torch.from_numpy(prob_BN)


def history_features(
    items: np.ndarray, offsets: np.ndarray, num_items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(history, item) int64 [E] of the distinct items of each history, and their features float64
    [E, F] in the order of `RepeatModel`'s fields."""
    lengths_B = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths_B)), lengths_B)
    ages = np.repeat(offsets[1:], lengths_B) - 1 - np.arange(len(items))
    # Newest first, unique keeps the latest place of each (history, item). Of the history 5 6 5:
    # items 5 and 6 with ages 0 and 1 and counts 2 and 1.
    keys = (owner * np.int64(num_items) + items)[::-1]
    keys_E, latest_E, counts_E = np.unique(keys, return_index=True, return_counts=True)
    users_E, items_E = np.divmod(keys_E, num_items)
    age_E = ages[::-1][latest_E]
    distinct_B = np.bincount(users_E, minlength=len(lengths_B))
    rate_B = np.log((lengths_B - distinct_B + 0.5) / (distinct_B + 2))
    length_B = np.log(np.maximum(lengths_B, 1))
    features = (
        np.ones(len(keys_E)),
        np.log1p(age_E),
        age_E == 0,
        np.log(counts_E),
        length_B[users_E],
        rate_B[users_E],
    )
    return users_E, items_E, np.stack(features, axis=1)


def fit_repeats(
    sequences: Sequences, trained_through: TrainedThrough, seed: int = 0
) -> RepeatModel | None:
    """The model fitted to the prefixes of the training parts and the item after each; None where no
    training part repeats an item.

    Args:
        sequences: The data.
        trained_through: The last position that is learned.
        seed: Of the sample of prefixes.
    """
    features, is_next, num_histories = [], [], 0
    for part in training_windows(sequences, trained_through):
        begins = np.flatnonzero(np.diff(part.users, prepend=-1))
        place = np.arange(len(part.items)) - np.repeat(
            begins, np.diff(begins, append=len(part.items))
        )
        ends = np.flatnonzero(place > 0)  # each is the target after a prefix
        lengths = np.minimum(place[ends], MOST_RECENT)
        order = keyed_permutation(len(ends), seed, _STREAM)
        share = MOST_ITEMS * len(part.items) / max(len(sequences.items), 1)
        chosen = order[: np.searchsorted(np.cumsum(lengths[order]), share) + 1]
        ends, lengths = ends[chosen], lengths[chosen]
        prefixes = part.items[flat_ranges(ends - lengths, lengths)]
        users_E, items_E, features_EF = history_features(
            prefixes, offsets_of(lengths), sequences.num_items
        )
        features.append(features_EF)
        is_next.append(part.items[ends][users_E] == items_E)
        num_histories += len(ends)
    features_EF, next_E = np.concatenate(features), np.concatenate(is_next).astype(np.float64)
    if not next_E.any():
        return None

    def loss(weights_F: np.ndarray) -> tuple[float, np.ndarray]:
        odds_E = features_EF @ weights_F
        total = np.sum(np.logaddexp(0, odds_E) - next_E * odds_E) / num_histories
        slope_F = features_EF.T @ (expit(odds_E) - next_E) / num_histories
        return (
            float(total + PENALTY * np.sum(weights_F[1:] ** 2)),
            slope_F + 2 * PENALTY * np.concatenate([[0], weights_F[1:]]),
        )

    found = minimize(loss, np.zeros(features_EF.shape[1]), jac=True, method="L-BFGS-B")
    return RepeatModel(*(float(f"{weight:.6g}") for weight in found.x))
