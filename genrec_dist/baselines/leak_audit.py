"""What a data set gives away before any model has learned: leaking numbers, repeats, unseen
targets, ties."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from genrec_shards.atomic import write_json
from genrec_shards.dataset import Dataset
from genrec_shards.histories import (
    exclude_history_default,
    repeated_targets,
    tied_targets,
    training_part,
)
from genrec_shards.numbering.numbering import Numbering
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split

from genrec_dist.baselines import counting, popularity
from genrec_dist.evaluation.metrics import (
    as_written,
    bootstrap_ci95,
    metrics_from_histogram,
    rank_histogram,
    target_ranks,
)
from genrec_dist.evaluation.ranked_lists import Rule

LEAK_FACTOR = 2.0
"""Numbers are said to leak where the counting rule's HR@5, at the low end of its 95 % interval, is
above this many times popularity's (or chance, 5 / items, where popularity is below chance).

The rule sees no interaction but the history. Twice popularity is more than numbers can tell by
luck, and more than numbers by training order tell by bringing neighbours together (Beauty: .0126,
popularity .0074); the standard numbering reaches seven times popularity. The interval keeps a
handful of users from raising the alarm."""


@dataclass(frozen=True)
class Audit:
    """Shares are of all users who have a target; each dict has the keys `validation` and `test`."""

    users: int
    items: int
    numbering: str
    """Name of the numbering that the codes are of."""
    counting: dict[str, dict[str, float]] | None
    """HR, NDCG and MRR of the counting rule with these codes; None where they are not distinct
    whole numbers."""
    counting_ci95: dict[str, list[float]] | None
    """[low, high] of the rule's metrics on test."""
    counting_of_ids: dict[str, dict[str, float]] | None
    """The same with the log's own ids in place of the codes."""
    counting_of_ids_ci95: dict[str, list[float]] | None
    popularity: dict[str, dict[str, float]]
    """The same of popularity trained through n-2, which the rule is measured against."""
    repeated_targets: dict[str, float]
    """Share of targets that are in the user's own history."""
    unseen_targets: dict[str, float]
    """Share of targets that no training part (n-2) holds."""
    tied_users: float | None
    """Share of users with two interactions at one time, so that their order is the file's; None
    without timestamps."""
    tied_held_out: float | None
    """Share of users with both targets whose targets have one time; None without timestamps."""

    tied_targets: dict[str, float] | None
    """Share of targets that share their time with another item of their user; None without
    timestamps."""

    @property
    def leaks(self) -> bool:
        """Whether the counting rule finds a leak in the codes, on test; False does not prove
        absence."""
        return self._leaks(self.counting_ci95)

    @property
    def ids_leak(self) -> bool:
        """The same of the log's own ids."""
        return self._leaks(self.counting_of_ids_ci95)

    def sentence(self) -> str:
        """The finding: what the log's own ids give away, and what the codes do."""
        return f"{self._of_ids()} {self._of_codes()}"

    def as_dict(self) -> dict[str, Any]:
        """What `audit.json` holds: the fields, `leaks`, `ids_leak` and `sentence`."""
        found = {"leaks": self.leaks, "ids_leak": self.ids_leak, "sentence": self.sentence()}
        return {**asdict(self), **found}

    def _of_ids(self) -> str:
        if self.counting_of_ids is None:
            return (
                "Your log's ids are not distinct whole numbers, so the rule that counts on from "
                "the last id cannot tell whether they leak."
            )
        score = as_written(self.counting_of_ids["test"]["HR@5"])
        popular = as_written(self.popularity["test"]["HR@5"])
        rule = f"a rule that learns nothing scores HR@5 {score} with them (popularity {popular})"
        if self.ids_leak:
            return f"Your log's ids leak: {rule}."
        bound = "which is a lower bound on a leak, not a proof of its absence"
        return f"Your log's ids show no leak: {rule}, {bound}."

    def _of_codes(self) -> str:
        if self.numbering == "given":
            if self.counting is None:
                return "They are the codes used here; --numbering random cannot leak."
            remedy = "; use --numbering random" if self.leaks else " (--numbering given)"
            return f"They are the codes used here{remedy}."
        codes = f"The {self.numbering} codes used here"
        if self.counting is None:
            return f"{codes} are no whole numbers, and the rule does not apply to them."
        remedy = ", which leaks; use --numbering random" if self.leaks else ""
        score = as_written(self.counting["test"]["HR@5"])
        if self.counting_of_ids is None:
            popular = as_written(self.popularity["test"]["HR@5"])
            score = f"it scores HR@5 {score} with them (popularity {popular})"
        return f"{codes}: {score}{remedy}."

    def _leaks(self, ci95: dict[str, list[float]] | None) -> bool:
        threshold = LEAK_FACTOR * max(self.popularity["test"]["HR@5"], 5 / self.items)
        return ci95 is not None and ci95["HR@5"][0] > threshold


def audit(
    sequences: Sequences, numbering: Numbering, timestamps: np.ndarray | None = None
) -> Audit:
    """Examine sequences with their own ids and with the codes of a numbering.

    Args:
        sequences: The data.
        numbering: A code per item row.
        timestamps: A number per interaction of `sequences.items`, or None.

    Raises:
        ValueError: Where codes or timestamps do not match the sequences in number.
    """
    codes = numbering.item_codes
    if len(codes) != sequences.num_items:
        raise ValueError(
            f"{len(codes)} item codes for {sequences.num_items} items: give one code per item row"
        )
    if timestamps is not None and len(timestamps) != sequences.num_interactions:
        raise ValueError(
            f"{len(timestamps)} timestamps for {sequences.num_interactions} interactions: give "
            "one per interaction"
        )
    of_ids = _counting(sequences, sequences.item_ids)
    of_codes = of_ids if codes == sequences.item_ids else _counting(sequences, codes)
    excluded = exclude_history_default(sequences)
    popular, unseen = {}, {}
    seen = np.zeros(sequences.num_items, dtype=bool)
    seen[training_part(sequences, "test", "n-2").items] = True
    for split in get_args(Split):
        by_popularity = popularity.fit(sequences, split, exclude_history=excluded)
        popular[split] = metrics_from_histogram(_histogram(sequences, split, by_popularity))
        view = sequences.history_and_target(split)
        unseen[split] = float((~seen[view.targets[view.users]]).mean())
    return Audit(
        users=sequences.num_users,
        items=sequences.num_items,
        numbering=numbering.name,
        counting=of_codes[0],
        counting_ci95=of_codes[1],
        counting_of_ids=of_ids[0],
        counting_of_ids_ci95=of_ids[1],
        popularity=popular,
        repeated_targets=repeated_targets(sequences),
        unseen_targets=unseen,
        tied_users=None if timestamps is None else _tied_users(sequences, timestamps),
        tied_held_out=None if timestamps is None else _tied_held_out(sequences, timestamps),
        tied_targets=None if timestamps is None else tied_targets(sequences, timestamps),
    )


def write_audit(dataset: Dataset, folder: Path | None = None) -> Audit:
    """Examine a data set and leave `audit.json` in its directory, or in the `folder` that has yet
    to become that."""
    found = audit(dataset.sequences, dataset.numbering, dataset.timestamps)
    write_json((folder or dataset.path) / "audit.json", found.as_dict())
    return found


def _counting(
    sequences: Sequences, codes: list[str]
) -> tuple[dict[str, dict[str, float]] | None, dict[str, list[float]] | None]:
    """Metrics of the counting rule by split, and their intervals on test; None of both where the
    codes are not distinct whole numbers."""
    if counting.whole_numbers(codes) is None:
        return None, None
    hists = {
        split: _histogram(sequences, split, counting.fit(sequences, split, codes=codes))
        for split in get_args(Split)
    }
    metrics = {split: metrics_from_histogram(hist) for split, hist in hists.items()}
    return metrics, bootstrap_ci95(hists["test"])


def _histogram(sequences: Sequences, split: Split, rule: Rule) -> np.ndarray:
    """Targets by rank in the rule's lists, of all users who have one."""
    view = sequences.history_and_target(split)
    lists = rule(view.users)
    return rank_histogram(target_ranks(lists.items_UN, view.targets[view.users]))


def _tied_users(sequences: Sequences, timestamps: np.ndarray) -> float:
    equal = np.zeros(len(timestamps), dtype=bool)
    equal[1:] = timestamps[1:] == timestamps[:-1]
    equal[sequences.offsets[:-1]] = False  # the item before is another user's
    return float(np.logical_or.reduceat(equal, sequences.offsets[:-1]).mean())


def _tied_held_out(sequences: Sequences, timestamps: np.ndarray) -> float:
    validation, test = (sequences.history_and_target(split) for split in get_args(Split))
    both = np.intersect1d(validation.users, test.users)
    # Of a split by time the targets lie in different periods.
    return (
        float((timestamps[validation.ends[both]] == timestamps[test.ends[both]]).mean())
        if len(both)
        else 0.0
    )
