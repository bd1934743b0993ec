"""What the paper reports of its data sets: sizes, and metrics with and without pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SetName = Literal["beauty", "sports", "toys", "yelp"]

"""What the paper reports, in its order."""
SOURCE = "arXiv 2407.21191"

Scores = tuple[float, float, float, float]


@dataclass(frozen=True)
class Published:
    """One data set in the paper."""

    users: int
    """Table 2."""
    items: int
    pretrained: Scores
    """Table 1, in the order of `METRICS`."""
    without: Scores
    """Table 3, without pretraining."""


SETS: dict[SetName, Published | None] = {
    "beauty": Published(
        users=22_363,
        items=12_101,
        pretrained=(0.0515, 0.0397, 0.0641, 0.0439),
        without=(0.0422, 0.0313, 0.0548, 0.0354),
    ),
    "sports": Published(
        users=35_598,
        items=18_357,
        pretrained=(0.0397, 0.0332, 0.0462, 0.0353),
        without=(0.0360, 0.0286, 0.0431, 0.0310),
    ),
    "toys": None,
    "yelp": Published(
        users=30_431,
        items=20_033,
        pretrained=(0.0627, 0.0475, 0.0724, 0.0507),
        without=(0.0626, 0.0469, 0.0716, 0.0499),
    ),
}
"""The paper has no Toys."""


def size_difference(name: SetName, users: int, items: int) -> str | None:
    """A sentence where the data are not of the size in the paper's Table 2; None where they are, or
    where the paper has no such data set."""
    found = SETS[name]
    if found is None or (users, items) == (found.users, found.items):
        return None
    return (
        f"{name} has {users:,} users and {items:,} items here, {found.users:,} and {found.items:,} "
        "in the paper's Table 2: another version of the data, so its rows are not those of the "
        "paper's file"
    )
