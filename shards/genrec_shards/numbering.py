"""Numberings: the digits that the word of an item or user carries."""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from genrec_shards.keyed import keyed_permutation
from genrec_shards.sequences import Sequences, update_with_strings

NumberingName = Literal["given", "random", "train-order"]

# Streams of the seed, so that items and users are not permuted alike.
_ITEM_STREAM, _USER_STREAM, _UNSEEN_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Numbering:
    """The code of each row, and where it came from."""

    name: NumberingName
    seed: int
    item_codes: list[str]
    """Index = item row."""
    user_codes: list[str]
    """Index = user row."""

    def numbering_hash(self) -> str:
        """sha256 (hex) of the codes: what a model trained with them depends on."""
        digest = hashlib.sha256(b"genrec numbering 1\n")
        update_with_strings(digest, self.item_codes)
        update_with_strings(digest, self.user_codes)
        return digest.hexdigest()


def number(sequences: Sequences, numbering: NumberingName, seed: int) -> Numbering:
    """Give each row its code. Only `given` may leak: it repeats the ids, whatever they tell.

    `random`: 1..N in a seeded order of the sorted catalogue. `train-order`: 1.. by first appearance in the training
    parts t_1..t_{n-2}, users in row order; items that never occur there take the remaining numbers in a seeded order.
    Users: a seeded order of 1..U, except under `given`. Raises ValueError for another name.
    """
    if numbering not in get_args(NumberingName):
        raise ValueError(f"numbering is {numbering!r}: choose one of {', '.join(get_args(NumberingName))}")
    if numbering == "given":
        return Numbering(numbering, seed, list(sequences.item_ids), list(sequences.user_ids))
    users = keyed_permutation(sequences.num_users, seed, _USER_STREAM)
    if numbering == "random":
        items = keyed_permutation(sequences.num_items, seed, _ITEM_STREAM)
    else:
        items = _places_by_training_order(sequences, seed)
    return Numbering(numbering, seed, _codes(items), _codes(users))


def _places_by_training_order(sequences: Sequences, seed: int) -> np.ndarray:
    """int64[N], a place 0..N-1 for each item row; held-out interactions are not looked at."""
    seen, first_positions = np.unique(_training_items(sequences), return_index=True)
    by_appearance = seen[np.argsort(first_positions, kind="stable")]
    unseen = np.setdiff1d(np.arange(sequences.num_items), seen)
    shuffled = unseen[keyed_permutation(len(unseen), seed, _UNSEEN_STREAM)]
    places = np.empty(sequences.num_items, dtype=np.int64)
    places[np.concatenate([by_appearance, shuffled])] = np.arange(sequences.num_items)
    return places


def _training_items(sequences: Sequences) -> np.ndarray:
    """The items of t_1..t_{n-2} of all users, in row order."""
    in_training = np.ones(sequences.num_interactions, dtype=bool)
    in_training[sequences.offsets[1:] - 1] = False
    in_training[sequences.offsets[1:] - 2] = False
    return sequences.items[in_training]


def _codes(places: np.ndarray) -> list[str]:
    return [str(place + 1) for place in places.tolist()]
