"""A log whose items have titles that tell their topic, and users who stay in one topic."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards

NUM_ITEMS, TOPICS, UNSEEN = 60, 6, 33


def write_data(folder: Path, swap_held_out: bool = False, **numbering: Any) -> Path:
    """Item i is of topic i % 6, which its title tells; a user stays in one topic. Item 33 is the
    last one of one user alone, who swaps it with another's where asked; item 9 has no title."""
    dice, users = random.Random(5), []
    for user in range(90):
        topic = [item for item in range(user % TOPICS, NUM_ITEMS, TOPICS) if item != UNSEEN]
        users.append(dice.sample(topic, 7))
    users[3][-1] = UNSEEN
    if swap_held_out:
        users[3][-2:], users[50][-2:] = users[50][-2:], users[3][-2:]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"u{n} {' '.join(f'i{item:02}' for item in row)}" for n, row in enumerate(users)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"i{item:02},{'' if item == 9 else f'topic{item % TOPICS} kind{item % TOPICS} word{item % 7}'}"
        for item in range(NUM_ITEMS)
    ]
    (folder / "items.csv").write_text("\n".join(["item,title", *rows]) + "\n")
    dataset = prepare(folder / "log.txt", folder / "data", items=folder / "items.csv", **numbering)
    write_shards(dataset, folder / "data" / "shards", users_per_shard=32, users_per_record=16)
    return folder / "data"
