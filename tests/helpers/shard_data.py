"""A data directory of given sequences, for tests of shards."""

from __future__ import annotations

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import sequences_from_ids, write_sequences


def make_dataset(folder, num_users=150, num_items=40, seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    lengths = 3 + rng.geometric(0.15, num_users)
    ids = [str(item) for item in rng.integers(0, num_items, lengths.sum())]
    log = sequences_from_ids([f"u{user}" for user in range(num_users)], lengths, ids)
    write_sequences(log, folder / "log.txt")
    return prepare(folder / "log.txt", folder / "data")
