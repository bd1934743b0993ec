"""Recommendations for a person to read: the items' titles beside their ids."""

from __future__ import annotations

import math

from genrec_shards.dataset import Dataset

from genrec_dist.inference.recommend import Recommendation, Request

LATEST = 5
"""Items of the history that are shown."""
LONGEST = 80
"""Characters of a title that are shown."""


class Titles:
    """Titles of the items of a data directory."""

    def __init__(self, dataset: Dataset) -> None:
        """Read the titles, or where the table had no column of them the items' texts.

        Raises:
            ValueError: The data has neither.
        """
        described = dataset.descriptions
        if described is None:
            info = dataset.info
            raise ValueError(
                f"{dataset.path}: its items have no titles: make it once more with "
                f"`genrec prepare {dataset.path} --out NEW --items META "
                f"--numbering {info.numbering} --seed {info.seed}` and give --data NEW"
            )
        self.of_item = dict(
            zip(dataset.sequences.item_ids, described.titles or described.texts, strict=True)
        )

    def of(self, item: str) -> str:
        """One line; says so where the item has none."""
        title = " ".join(self.of_item.get(item, "").split())
        if not title:
            return "(no title)" if item in self.of_item else "(not in the catalogue)"
        return title if len(title) <= LONGEST else title[: LONGEST - 3] + "..."

    def page(self, request: Request, answer: Recommendation) -> str:
        """Who, what they took last, and the list: place, probability, id and title on a line."""
        history = list(request.history)
        whose = "a history" if request.user is None else f"user {request.user}"
        lines = [f"{whose} of {len(history)} item{'s' * (len(history) != 1)}"]
        latest = history[-LATEST:]
        width = max(map(len, [*latest, *answer.items]), default=0)
        if len(history) > LATEST:
            lines.append(f"{'...':>14}")
        lines += [f"{'':14}  {item:<{width}}  {self.of(item)}" for item in latest]
        for place, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), 1):
            lines.append(f"{place:4}  {math.exp(score):8.5f}  {item:<{width}}  {self.of(item)}")
        return "\n".join(lines) + "\n"
