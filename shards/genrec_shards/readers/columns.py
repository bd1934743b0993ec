"""Which of a log's columns or fields are its users, items and times."""

from __future__ import annotations

from collections.abc import Sequence

COLUMNS = {
    "users": ["user", "user_id", "userid", "reviewerid", "customer_id", "visitorid", "uid"],
    "items": [
        *("item", "item_id", "itemid", "parent_asin", "asin", "business_id", "product_id"),
        *("productid", "movieid", "movie_id", "iid"),
    ],
    "times": [
        *("timestamp", "time", "date", "datetime", "unixreviewtime", "ts", "event_time"),
        "created_at",
    ],
}
"""Where users, items and times are looked for, in this order, unless columns are named; compared
with `plain_name`."""
NAME_THEM = "name the three with --columns USER,ITEM,TIME"


def first_of(usual: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the usual names that is among `names`, as it is spelled there."""
    spelled = {plain_name(name): name for name in reversed(names)}
    return next((spelled[name] for name in usual if name in spelled), None)


def plain_name(name: str) -> str:
    """A column's name without what does not matter: capitals, `-` or a space for `_`, and what
    follows a colon, as in RecBole's `user_id:token`."""
    return name.strip().partition(":")[0].lower().replace("-", "_").replace(" ", "_")


def find_columns(names: Sequence[str], columns: Sequence[str] | None) -> list[int | None]:
    """The places of users, items and times among the names; None of one that is not there.

    Args:
        names: of the columns, as the log has them.
        columns: what the user named the three by, as the log has it or plainly; None looks for
            usual names.
    """
    known = [plain_name(name) for name in names]
    if columns is not None:
        plain = {name: at for at, name in reversed([*enumerate(known)])}
        exact = {name: at for at, name in reversed([*enumerate(names)])}
        return [exact.get(name, plain.get(name)) for name in columns]
    return [
        next((known.index(name) for name in usual if name in known), None)
        for usual in COLUMNS.values()
    ]
