"""Numberings: the code that the word of an item or user carries."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.numbering.balanced_clusters import places_in_tree
from genrec_shards.numbering.cooccurrence import (
    WINDOW,
    cooccurrence_vectors,
    neighbour_vectors,
    training_counts,
    training_items,
)
from genrec_shards.numbering.hierarchical_codes import MOST_LEVELS, balance, code_texts
from genrec_shards.numbering.item_text import Descriptions, text_vectors
from genrec_shards.numbering.item_vectors import TrainedVectors
from genrec_shards.sequences import Sequences, update_with_strings
from genrec_shards.splits import TrainedThrough

NumberingName = Literal["given", "random", "train-order", "collaborative", "semantic", "combined"]
HIERARCHICAL = ("collaborative", "semantic", "combined")
DESCRIBED = ("semantic", "combined")
"""Made of the items' texts, alone or among others."""

DIMS = 64
"""Width of the vectors that are clustered, where they are not given."""
NEIGHBOUR_DIMS = 128
"""Width of the part of combined vectors that co-occurrence makes."""
TEXT_LENGTH = 0.6
"""Length of the part that texts make, where that of co-occurrence is 1 (docs/log.md)."""
ITEMS_PER_LEAF = 3
"""About how many items the default levels leave in a leaf."""
WIDEST_DEFAULT = 256
"""Most branches of a default level."""

# Streams of the seed, so that items and users are not permuted alike.
_ITEM_STREAM, _USER_STREAM, _UNSEEN_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Hierarchy:
    """What hierarchical codes were made of."""

    made_from: Literal["co-occurrence", "vectors", "text", "co-occurrence and text"]
    levels: tuple[int, ...]
    """Clusters at each level; the number within a leaf comes after them."""
    dims: int
    """Width of the clustered vectors."""
    window: int | None
    """Steps apart that items count as a pair; None unless made from co-occurrence."""
    file: str | None
    """Name of the file of vectors or texts."""
    file_sha256: str | None
    trained_through: TrainedThrough | None
    """What the vectors have seen; None for text, which sees no interaction."""
    unseen: int
    """Items that no training part holds."""
    placed_at_random: int
    """Items of which nothing was known to place them by."""


@dataclass(frozen=True)
class Numbering:
    """The code of each row, and where it came from."""

    name: NumberingName
    seed: int
    item_codes: list[str]
    """Index = item row."""
    user_codes: list[str]
    """Index = user row."""
    hierarchy: Hierarchy | None = None
    """Of `collaborative` and `semantic` codes."""

    def numbering_hash(self) -> str:
        """sha256 (hex) of the codes: what a model trained with them depends on."""
        digest = hashlib.sha256(b"genrec numbering 1\n")
        update_with_strings(digest, self.item_codes)
        update_with_strings(digest, self.user_codes)
        return digest.hexdigest()


def number(
    sequences: Sequences,
    numbering: NumberingName,
    seed: int,
    *,
    levels: Sequence[int] | None = None,
    vectors: TrainedVectors | None = None,
    descriptions: Descriptions | None = None,
) -> Numbering:
    """Give each row its code. Only `given` may leak: it repeats the ids, whatever they tell.

    `random`: 1..N in a seeded order of the sorted catalogue. `train-order`: 1.. by first appearance
    in the training parts t_1..t_{n-2}, users in row order; items that never occur there take the
    remaining numbers in a seeded order. `collaborative`: words `a12-b45-c7`, a place in a tree of
    balanced clusters (`balanced_clusters.py`; the idea of codes from co-occurrence: Hua et al.,
    arXiv 2305.06569) of items that are taken near each other in the training parts, or of trained
    vectors; items unseen there get seeded places. `semantic`: the same of the items' descriptions.
    `combined`: of co-occurrence and descriptions side by side, so that an item that is rarely taken
    is placed by its text. Residual quantisation would make neither unique nor balanced codes.
    Users: a seeded order of 1..U, except under `given`.

    Args:
        sequences: the log.
        numbering: which of these.
        seed: of every seeded order.
        levels: clusters at each level of a hierarchical code; None: `default_levels`.
        vectors: trained item vectors for `collaborative`.
        descriptions: the items' texts, for `semantic` and `combined`.

    Raises:
        ValueError: another name, or an argument that does not go with it.
    """
    if numbering not in get_args(NumberingName):
        choices = ", ".join(get_args(NumberingName))
        raise ValueError(f"numbering is {numbering!r}: choose one of {choices}")
    if levels is not None and numbering not in HIERARCHICAL:
        only = "only collaborative, semantic and combined codes have levels"
        raise ValueError(f"levels with numbering {numbering}: {only}")
    if levels is not None and not (1 <= len(levels) < MOST_LEVELS and min(levels) >= 1):
        remedy = f"give 1 to {MOST_LEVELS - 1} whole numbers above 0, as 64,64"
        raise ValueError(f"levels {','.join(map(str, levels)) or 'none'}: {remedy}")
    if vectors is not None and numbering != "collaborative":
        only = "only collaborative codes are made of vectors"
        raise ValueError(f"vectors with numbering {numbering}: {only}")
    if descriptions is not None and numbering not in DESCRIBED:
        only = "only semantic and combined codes are made of text"
        raise ValueError(f"descriptions with numbering {numbering}: {only}")
    if descriptions is None and numbering in DESCRIBED:
        needs = "needs the items' text or attributes: give --items META"
        raise ValueError(f"numbering {numbering} {needs}")

    if numbering == "given":
        return Numbering(numbering, seed, list(sequences.item_ids), list(sequences.user_ids))
    users = numbers_from(0, keyed_permutation(sequences.num_users, seed, _USER_STREAM))
    if numbering == "random":
        items = numbers_from(0, keyed_permutation(sequences.num_items, seed, _ITEM_STREAM))
        return Numbering(numbering, seed, items, users)
    if numbering == "train-order":
        items = numbers_from(0, places_by_training_order(sequences, 0, seed, _UNSEEN_STREAM))
        return Numbering(numbering, seed, items, users)

    counts = training_counts(sequences)
    if descriptions is not None:
        points = text_vectors(descriptions.texts, DIMS, seed)
        if numbering == "combined":
            near = neighbour_vectors(sequences, NEIGHBOUR_DIMS, seed)
            points = np.hstack([unit_vectors(near), TEXT_LENGTH * unit_vectors(points)])
    elif vectors is not None:
        # What a model holds for an item that it has never met is where its random start drifted to.
        points = np.where(counts[:, None] > 0, vectors.values, 0)
    else:
        points = cooccurrence_vectors(sequences, DIMS, seed)
    levels = tuple(levels) if levels is not None else default_levels(sequences.num_items)
    items = code_texts(places_in_tree(points, counts, levels, seed))
    assert len(set(items)) == len(items)
    source = descriptions or vectors
    made_from: Any = "text" if descriptions else "vectors" if vectors else "co-occurrence"
    if numbering == "combined":
        made_from = "co-occurrence and text"
    counted = made_from.startswith("co-occurrence")
    hierarchy = Hierarchy(
        made_from=made_from,
        levels=levels,
        dims=points.shape[1],
        window=WINDOW if counted else None,
        file=source.name if source else None,
        file_sha256=source.sha256 if source else None,
        trained_through="n-2" if counted else vectors.trained_through if vectors else None,
        unseen=int((counts == 0).sum()),
        placed_at_random=int((~points.any(axis=1)).sum()),
    )
    return Numbering(numbering, seed, items, users, hierarchy)


def unit_vectors(vectors_ND: np.ndarray) -> np.ndarray:
    """The rows, each of length 1; rows of zeros stay."""
    lengths_N1 = np.sqrt((vectors_ND * vectors_ND).sum(axis=1, keepdims=True))
    units: np.ndarray = np.divide(
        vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0
    )
    return units


def default_levels(num_items: int) -> tuple[int, ...]:
    """Two equally wide levels, or as many as keep each within WIDEST_DEFAULT, that leave about
    three items in a leaf."""
    leaves = max(num_items / ITEMS_PER_LEAF, 1)
    depth = 2
    while leaves ** (1 / depth) > WIDEST_DEFAULT:
        depth += 1
    return (max(round(leaves ** (1 / depth)), 1),) * depth


def summary(numbering: Numbering) -> list[str]:
    """Lines for a person: what hierarchical codes were made of and how even they are; none of other
    numberings."""
    made = numbering.hierarchy
    if made is None:
        return []
    codes = numbering.item_codes
    source = made.made_from + (f" ({made.file})" if made.file else "")
    if made.trained_through:
        source += f", trained through {made.trained_through}"
    lines = [
        f"codes like {codes[0]}, made from {source}; {len(codes) - len(set(codes))} collisions; "
        f"{made.unseen:,} items unseen in training, {made.placed_at_random:,} placed at random"
    ]
    for level, found in enumerate(balance(codes), start=1):
        items = f"{found.smallest:,} to {found.largest:,} items (median {found.median:g})"
        entropy = f"entropy share {found.entropy_share:.4f}"
        lines.append(f"level {level}: {found.beginnings:,} beginnings of {items}, {entropy}")
    return lines


def places_by_training_order(
    sequences: Sequences, known: int, seed: int, *streams: int
) -> np.ndarray:
    """int64[N - known], a place from 0 for each item row from `known` on: by first appearance in
    the training parts, then in an order seeded by (seed, *streams)."""
    # Training parts 5 3 | 3 | 9 5: first_positions of 3, 5 and 9 are 1, 0 and 3, so they appear in
    # the order 5 3 9.
    seen, first_positions = np.unique(training_items(sequences)[0], return_index=True)
    by_appearance = seen[np.argsort(first_positions, kind="stable")]
    by_appearance = by_appearance[by_appearance >= known]
    unseen = np.setdiff1d(np.arange(known, sequences.num_items), by_appearance)
    shuffled = unseen[keyed_permutation(len(unseen), seed, *streams)]
    places = np.empty(sequences.num_items - known, np.int64)
    places[np.concatenate([by_appearance, shuffled]) - known] = np.arange(len(places))
    return places


def numbers_from(known: int, places: np.ndarray) -> list[str]:
    """Codes of places 0, 1, ... that follow `known` numbers."""
    return [str(known + place + 1) for place in places.tolist()]
