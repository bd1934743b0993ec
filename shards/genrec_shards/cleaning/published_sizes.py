"""The counts that published sets must have, so that a comparison with published numbers is one."""

from dataclasses import dataclass
from typing import Literal, get_args

from genrec_shards.errors import DataError
from genrec_shards.sequences import Sequences

SetName = Literal["beauty", "sports", "toys", "yelp"]
PAPER = "the paper's Table 2"


@dataclass(frozen=True)
class PublicSet:
    """A set after cleaning with a 5-core."""

    users: int
    items: int
    source: str = PAPER
    since: str | None = None
    until: str | None = None
    """The range of dates that it was cut to, both ends included."""


SETS: dict[SetName, PublicSet] = {
    "beauty": PublicSet(22_363, 12_101),
    "sports": PublicSet(35_598, 18_357),
    # The paper has no Toys; the work whose files it shares has.
    "toys": PublicSet(19_412, 11_924, "the table of S3-Rec (Zhou et al., 2020)"),
    "yelp": PublicSet(30_431, 20_033, PAPER, "2019-01-01", "2019-12-31T00:00:00"),
}


def public_set(name: str) -> PublicSet:
    """Raises ValueError for a name that is none."""
    if name not in get_args(SetName):
        raise ValueError(f"expected set is {name!r}: choose one of {', '.join(get_args(SetName))}")
    return SETS[name]  # type: ignore[index]


def check_expected(name: str, sequences: Sequences, source: str) -> str:
    """A sentence that says so where the counts are those published; otherwise raises DataError."""
    wanted = public_set(name)
    found = f"{sequences.num_users:,} users and {sequences.num_items:,} items"
    if (sequences.num_users, sequences.num_items) != (wanted.users, wanted.items):
        published = f"{wanted.source} has {wanted.users:,} and {wanted.items:,} of {name}"
        remedy = "take the file and cleaning named in docs/data.md, or leave out --expect"
        raise DataError(f"{source}: {found}, {published}: {remedy}")
    return f"{found}, as {wanted.source} has of {name}"
