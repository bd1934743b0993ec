"""What the paper reports of its data sets: metrics with and without pretraining, and a word where
sizes differ."""

from __future__ import annotations

from typing import NamedTuple

from genrec_shards.cleaning.published_sizes import SetName, public_set

SOURCE = "arXiv 2407.21191"
Scores = tuple[float, float, float, float]
"""In the order of `METRICS`."""


class Published(NamedTuple):
    """One data set in the paper."""

    pretrained: Scores
    """Table 1."""
    without: Scores
    """Table 3, without pretraining."""


SETS: dict[SetName, Published | None] = {
    "beauty": Published((0.0515, 0.0397, 0.0641, 0.0439), (0.0422, 0.0313, 0.0548, 0.0354)),
    "sports": Published((0.0397, 0.0332, 0.0462, 0.0353), (0.0360, 0.0286, 0.0431, 0.0310)),
    "toys": None,
    "yelp": Published((0.0627, 0.0475, 0.0724, 0.0507), (0.0626, 0.0469, 0.0716, 0.0499)),
}
"""The paper has no Toys."""


def size_difference(name: SetName, users: int, items: int) -> str | None:
    """A sentence where the data are not of the size in the paper's Table 2; None where they are, or
    where the paper has no such data set."""
    found = public_set(name)
    if SETS[name] is None or (users, items) == (found.users, found.items):
        return None
    return (
        f"{name} has {users:,} users and {items:,} items here, {found.users:,} and {found.items:,} "
        "in the paper's Table 2: another version of the data, so its rows are not those of the "
        "paper's file"
    )
