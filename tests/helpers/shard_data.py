"""Data directories of made-up sequences, and their shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import sequences_from_ids, write_sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process

NUM_USERS, NUM_RECORDS = 150, 10


def make_dataset(folder: Path, num_users: int = NUM_USERS, num_items: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = 3 + rng.geometric(0.15, num_users)
    ids = [str(item) for item in rng.integers(0, num_items, lengths.sum())]
    log = sequences_from_ids([f"u{user}" for user in range(num_users)], lengths, ids)
    write_sequences(log, folder / "log.txt")
    return prepare(folder / "log.txt", folder / "data")


def shard(dataset: Dataset, folder: Path, users_per_record: int = 16) -> Path:
    """Shards of ten records in three tars."""
    write_shards(dataset, folder, users_per_shard=64, users_per_record=users_per_record)
    return folder


def sharded_process(folder: Path, users_per_shard: int = 32) -> Path:
    """`folder/data` with its shards: 90 users of 5 to 9 of 64 items whose order can be learned."""
    write_sequences(make_process(num_items=64, num_groups=8).sample(90, 5, 9), folder / "log.txt")
    dataset = prepare(folder / "log.txt", folder / "data")
    shards = folder / "data" / "shards"
    write_shards(dataset, shards, users_per_shard=users_per_shard, users_per_record=16)
    return folder / "data"


def sequence_of(dataset: Dataset, user: int) -> list[int]:
    offsets = dataset.sequences.offsets
    return dataset.sequences.items[offsets[user] : offsets[user + 1]].tolist()


def check_gather(reader: ShardReader, dataset: Dataset, users: list[int]) -> None:
    items, offsets = reader.gather(np.array(users, dtype=np.int64))
    assert (items.dtype, offsets.dtype, len(offsets)) == (np.int32, np.int64, len(users) + 1)
    for place, user in enumerate(users):
        assert items[offsets[place] : offsets[place + 1]].tolist() == sequence_of(dataset, user)
