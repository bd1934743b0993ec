"""A log over the year 2014 whose rows from July on are drawn by a seed of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from genrec_shards.timestamps import moment

DATES = "2014-07-01,2014-10-01"
NUM_USERS, NUM_ITEMS = 40, 12
Row = tuple[str, str, int]
"""User, item, microseconds."""


def write_log(path: Path, held_out_seed: int = 0, num_items: int = NUM_ITEMS) -> list[Row]:
    """Users u36 to u39 and two items come in July; no user has two rows of one time."""
    rows: list[Row] = []
    start = moment("2014-01-01", "")
    # Day 180 is the last of June.
    for stream, first, end in (([0], 0, 181), ([0, held_out_seed], 181, 365)):
        dice = np.random.default_rng(stream)
        for user in range(NUM_USERS if first else NUM_USERS - 4):
            for _ in range(dice.integers(0 if first else 4, 9)):
                day, item = (
                    int(dice.integers(first, end)),
                    int(dice.integers(num_items + 2 if first else num_items)),
                )
                rows.append(
                    (f"u{user:02}", f"i{item:02}", start + (day * 86_400 + len(rows)) * 1_000_000)
                )
    dice.shuffle(rows)
    lines = [f"{user},{item},{time // 1_000_000}" for user, item, time in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n", encoding="utf-8")
    return [(str(user), str(item), int(time)) for user, item, time in rows]
