"""A log of films with times, and their titles: what examples and the notebook are run on in
tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from genrec_shards.synthetic import make_process


def write_films(folder: Path, num_users: int = 200) -> tuple[Path, Path]:
    """`log.csv` (user, item, timestamp) and `films.csv` (item, title); the users' order can be
    learned."""
    sequences = make_process(num_items=64, num_groups=8).sample(num_users, 6, 12)
    rows = ["user,item,timestamp"]
    for user in range(sequences.num_users):
        start, end = sequences.offsets[user : user + 2]
        items = np.asarray(sequences.item_ids)[sequences.items[start:end]]
        rows += [f"u{user},{item},{1_600_000_000 + 60 * at}" for at, item in enumerate(items)]
    log, films = folder / "log.csv", folder / "films.csv"
    log.write_text("\n".join(rows) + "\n", encoding="utf-8")
    titles = [f"{item},A film called {item}" for item in sequences.item_ids]
    films.write_text("\n".join(["item,title", *titles]) + "\n", encoding="utf-8")
    return log, films
