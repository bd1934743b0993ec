"""Random sequences, and the same with other held-out items."""

from __future__ import annotations

import numpy as np
from genrec_shards.sequences import Sequences, sequences_from_ids


def random_sequences(num_users: int = 40, num_items: int = 60, seed: int = 0) -> Sequences:
    """Skewed popularity, repeated items, lengths 3 to 30; ids are whole numbers, some above 64."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 31, num_users)
    draws = (num_items * rng.random(lengths.sum()) ** 2).astype(int) + 10
    users = [f"u{user}" for user in range(num_users)]
    return sequences_from_ids(users, lengths, [str(item) for item in draws])


def changed(sequences: Sequences, last: int, seed: int = 5) -> Sequences:
    """The same catalogue, but other items in the last `last` places of each sequence."""
    items = sequences.items.copy()
    rng = np.random.default_rng(seed)
    for back in range(1, last + 1):
        others = rng.integers(0, sequences.num_items, sequences.num_users)
        items[sequences.offsets[1:] - back] = others
    return Sequences(items, sequences.offsets, sequences.user_ids, sequences.item_ids)
