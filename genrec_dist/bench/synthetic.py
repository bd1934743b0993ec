"""What is measured on: a synthetic log, and a catalogue spelled as BART's tokenizer spells it."""

# B users, U all users, N items, W words

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences, offsets_of, sequences_from_ids, write_sequences

from genrec_dist.data.encoder_input import EncoderInput, encode_histories, ragged
from genrec_dist.data.layout import Layout
from genrec_dist.data.word_table import WordTable

BEAUTY_USERS, BEAUTY_ITEMS = 22_363, 12_101
VOCABULARY = 50_265
"""BART's, with its special tokens in their places."""
BOS, PAD, EOS, MASK = 0, 1, 2, 50_264
MAX_TOKENS = 512


def make_data(
    folder: Path, num_users: int = BEAUTY_USERS, num_items: int = BEAUTY_ITEMS, seed: int = 0
) -> Dataset:
    """Prepared sequences of 5 items and more, 9 on average, in a new `folder`.

    The popularity of rank r falls as 1 / r; of the rarest items some are never drawn."""
    dice = np.random.default_rng(seed)
    lengths = 4 + dice.geometric(1 / 5, num_users)
    items = np.exp(dice.random(lengths.sum()) * np.log(num_items)).astype(np.int64)
    users = [f"u{user}" for user in range(num_users)]
    folder.mkdir()
    log = sequences_from_ids(users, lengths, [str(item) for item in items])
    write_sequences(log, folder / "log.txt")
    return prepare(folder / "log.txt", folder / "data")


def load_or_make(data: Path | None, folder: Path, num_users: int, num_items: int) -> Dataset:
    """What is in a directory of `genrec prepare`, or a synthetic log in a new `folder`."""
    return make_data(folder, num_users, num_items) if data is None else load_dataset(data)


def open_data(
    data: Path | None, num_users: int, num_items: int
) -> tuple[Dataset, dict[str, str | int]]:
    """A directory of `genrec prepare`, or a synthetic log; and its facts for a table."""
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as folder:
        dataset = load_or_make(data, Path(folder, "made"), num_users, num_items)
    log, source = dataset.sequences, data.name if data else "synthetic"
    return dataset, {"source": source, "users": log.num_users, "items": log.num_items}


def spell(
    codes: np.ndarray, stem: tuple[int, int], pieces: np.ndarray, num_groups: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [total], offsets int64 [N + 1]) of words such as ` item_12345`.

    BART's tokenizer cuts it into ` item`, `_`, and the digits in groups of three from the right:
    `12`, `345`.

    Args:
        codes: int64 [N], all with `num_groups` groups of digits.
        stem: tokens of ` item` and `_`.
        pieces: int [2000], the token of each leading group, then of each later one, which may
            begin with zeros.
    """
    columns = [np.full(len(codes), token) for token in stem]
    for place in range(num_groups)[::-1]:
        group = codes // 1000**place % 1000
        columns.append(pieces[group + (0 if place == num_groups - 1 else 1000)])
    tokens_NC = np.stack(columns, axis=1).astype(np.int32)
    return tokens_NC.ravel(), np.arange(len(codes) + 1) * tokens_NC.shape[1]


def make_words(num_items: int, num_users: int) -> WordTable:
    """Items and users with random codes from 1000 on, spelled with scattered tokens of BART's.

    Every item has four sub-words, so that a search ends all its beams in the same step, whatever
    the weights: with random ones nothing else would."""
    dice = np.random.default_rng(0)
    tokens = dice.permutation(np.arange(4, MASK))[:2003]
    item, user, bar = (int(token) for token in tokens[:3])
    items, item_offsets = spell(dice.permutation(num_items) + 1000, (item, bar), tokens[3:])
    users, user_offsets = spell(dice.permutation(num_users) + 1000, (user, bar), tokens[3:])
    lengths = np.concatenate([[1, 1, 1], np.diff(item_offsets), np.diff(user_offsets)])
    words = np.concatenate([np.array([BOS, EOS, MASK], np.int32), items, users])
    return WordTable(
        words, offsets_of(lengths), num_masks=1, num_items=num_items, num_users=num_users
    )


@dataclass(frozen=True)
class Histories:
    """The test histories of a data set, as the encoder reads them."""

    sequences: Sequences
    layout: Layout

    @staticmethod
    def of(sequences: Sequences) -> Histories:
        words = make_words(sequences.num_items, sequences.num_users)
        more = {"max_tokens": MAX_TOKENS, "user_ids": True, "positions": "from-start"}
        return Histories(sequences, Layout(words, PAD, **more))  # type: ignore[arg-type]

    def encode(self, users_B: np.ndarray) -> EncoderInput:
        """Their histories side by side, padded to the longest."""
        view = self.sequences.history_and_target("test")
        starts_B, lengths_B = view.starts[users_B], (view.ends - view.starts)[users_B]
        flat, offsets = ragged(starts_B, lengths_B)
        return encode_histories(view.items[flat], offsets, users_B, self.layout)

    def typical_users(self, size: int) -> np.ndarray:
        """User rows int64 [size] at even steps from the shortest history to the longest.

        A batch drawn at random can be padded to 40 sub-words or to 180, as chance has it."""
        by_length = np.argsort(self.sequences.lengths, kind="stable")
        return by_length[((np.arange(size) + 0.5) / size * len(by_length)).astype(np.int64)]
