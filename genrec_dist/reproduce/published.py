"""What the paper says of the four sets: sizes, and its rows with and without pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SetName = Literal["beauty", "sports", "toys", "yelp"]

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
"""What the paper reports, in its order."""
SOURCE = "arXiv 2407.21191"


@dataclass(frozen=True)
class Published:
    """One set in the paper; it has no Toys."""

    users: int | None = None
    """Table 2."""
    items: int | None = None
    pretrained: tuple[float, float, float, float] | None = None
    """Table 1, in the order of `METRICS`."""
    without: tuple[float, float, float, float] | None = None
    """Table 3, without pretraining."""


SETS: dict[SetName, Published] = {
    "beauty": Published(
        22_363, 12_101, (0.0515, 0.0397, 0.0641, 0.0439), (0.0422, 0.0313, 0.0548, 0.0354)
    ),
    "sports": Published(
        35_598, 18_357, (0.0397, 0.0332, 0.0462, 0.0353), (0.0360, 0.0286, 0.0431, 0.0310)
    ),
    "toys": Published(),
    "yelp": Published(
        30_431, 20_033, (0.0627, 0.0475, 0.0724, 0.0507), (0.0626, 0.0469, 0.0716, 0.0499)
    ),
}


def published_rows(name: SetName) -> dict[str, dict[str, float]]:
    """The paper's rows of a set, by name; none of Toys."""
    found = SETS[name]
    rows = {"GenRec, published": found.pretrained, "without pretraining, published": found.without}
    return {
        row: dict(zip(METRICS, scores, strict=True))
        for row, scores in rows.items()
        if scores is not None
    }


def odd_sizes(name: SetName, users: int, items: int) -> str | None:
    """In words, where the data are not of the size that the paper's Table 2 says; None where they
    are or it says nothing."""
    found = SETS[name]
    if found.users is None:
        return None
    if (users, items) == (found.users, found.items):
        return None
    return (
        f"{name} has {users:,} users and {items:,} items here, {found.users:,} and {found.items:,} in the paper's Table 2: "
        "another cut of the data, so its rows are not those of the paper's file"
    )
