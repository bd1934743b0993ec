"""Codes of items and users that come later: the old ones stay what they are, the new ones fit in
beside them."""

# N items, M of them new, F features, P branches of a level, L levels

import dataclasses
import heapq

import numpy as np
import scipy.sparse as sp

from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.numbering.cooccurrence import (
    WINDOW,
    cooccurrences,
    training_counts,
    training_items,
)
from genrec_shards.numbering.hierarchical_codes import code_texts, num_collisions, places_of_codes
from genrec_shards.numbering.item_text import Descriptions, word_weights
from genrec_shards.numbering.numbering import HIERARCHICAL, Numbering
from genrec_shards.sequences import Sequences

_ITEM_STREAM, _USER_STREAM, _UNSEEN_STREAM, _ROOM_STREAM, _LEAF_STREAM = 21, 22, 23, 24, 25
_AT_ONCE = 256
"""New items that are compared with all branches of a level at once."""


def continued(
    before: Numbering, sequences: Sequences, descriptions: Descriptions | None = None
) -> Numbering:
    """The numbering of sequences whose first rows have the codes `before`; those do not change.

    `given`: the ids. `random`: the numbers that follow, in a seeded order. `train-order`: the
    numbers that follow, by first appearance in the training parts t_1..t_{n-2}, then in a seeded
    order. Hierarchical: a new number in the leaf that is nearest, from the first level down: of
    `semantic` by the words of `descriptions`, else, and where these say nothing, by the items it is
    taken near in the training parts, else where there is most room. Users: the numbers that follow,
    in a seeded order, except under `given`. Held-out interactions are not looked at."""
    known_items, known_users, seed = len(before.item_codes), len(before.user_codes), before.seed
    if before.name == "given":
        return dataclasses.replace(
            before, item_codes=list(sequences.item_ids), user_codes=list(sequences.user_ids)
        )
    users = _numbers(
        known_users,
        keyed_permutation(sequences.num_users - known_users, seed, _USER_STREAM, known_users),
    )
    hierarchy = before.hierarchy
    if before.name in HIERARCHICAL:
        assert hierarchy is not None
        places_ML, at_random = _leaves(before, sequences, descriptions)
        items = code_texts(places_ML)
        unseen = int((training_counts(sequences) == 0).sum())
        hierarchy = dataclasses.replace(
            hierarchy, unseen=unseen, placed_at_random=hierarchy.placed_at_random + at_random
        )
    elif before.name == "random":
        items = _numbers(
            known_items,
            keyed_permutation(sequences.num_items - known_items, seed, _ITEM_STREAM, known_items),
        )
    else:
        items = _numbers(known_items, _places_by_training_order(sequences, known_items, seed))
    item_codes, user_codes = [*before.item_codes, *items], [*before.user_codes, *users]
    assert num_collisions(item_codes) == num_collisions(user_codes) == 0
    return Numbering(before.name, seed, item_codes, user_codes, hierarchy)


def _numbers(known: int, places: np.ndarray) -> list[str]:
    return [str(known + place + 1) for place in places.tolist()]


def _places_by_training_order(sequences: Sequences, known: int, seed: int) -> np.ndarray:
    """int64[M], a place 0..M-1 for each new item."""
    seen, first_positions = np.unique(training_items(sequences)[0], return_index=True)
    by_appearance = seen[np.argsort(first_positions, kind="stable")]
    by_appearance = by_appearance[by_appearance >= known]
    unseen = np.setdiff1d(np.arange(known, sequences.num_items), by_appearance)
    shuffled = unseen[keyed_permutation(len(unseen), seed, _UNSEEN_STREAM, known)]
    places = np.empty(sequences.num_items - known, np.int64)
    places[np.concatenate([by_appearance, shuffled]) - known] = np.arange(len(places))
    return places


def _leaves(
    before: Numbering, sequences: Sequences, descriptions: Descriptions | None
) -> tuple[np.ndarray, int]:
    """(int64[M, L] places of the new items, from 0; how many of them nothing was known of)."""
    known_NL = places_of_codes(before.item_codes)
    first, num_levels = len(known_NL), known_NL.shape[1] - 1
    branches_NL = np.full((sequences.num_items, num_levels), -1)
    branches_NL[:first] = known_NL[:, :-1]
    if before.name == "semantic" and descriptions is not None:
        words_NF = word_weights(descriptions.texts)
        branches_NL[first:] = nearest_leaves(words_NF[first:], words_NF[:first], known_NL[:, :-1])
    weights_NN = cooccurrences(sequences, WINDOW)
    # Over the square root of the other's mass, as `neighbour_vectors` weighs: a popular neighbour
    # says less.
    weights_NN = (
        weights_NN @ sp.diags(1 / np.sqrt(np.asarray(weights_NN.sum(axis=1)).ravel() + 1))
    ).tocsr()
    while True:  # a new item beside new items alone follows them a round later
        placed = np.flatnonzero(branches_NL[:, 0] >= 0)
        waiting = np.flatnonzero(branches_NL[:, 0] < 0)
        found = nearest_leaves(
            weights_NN[waiting][:, placed],
            sp.identity(len(placed), format="csr"),
            branches_NL[placed],
        )
        branches_NL[waiting] = found
        if not (found >= 0).any():
            break
    unknown = np.flatnonzero(branches_NL[:, 0] < 0)
    unknown = unknown[keyed_permutation(len(unknown), before.seed, _ROOM_STREAM, first)]
    _fill_up(branches_NL, unknown)
    places_NL = np.column_stack([branches_NL, np.zeros(len(branches_NL), np.int64)])
    places_NL[:first] = known_NL
    _number_in_leaves(places_NL, first, training_counts(sequences), before.seed)
    return places_NL[first:], len(unknown)


def nearest_leaves(
    profiles_MF: sp.csr_matrix, features_NF: sp.csr_matrix, branches_NL: np.ndarray
) -> np.ndarray:
    """int64[M, L]: level by level the branch whose items' features together point most the way a
    profile does.

    `branches_NL`: the branch of each of N items at each level. -1 in all levels where a profile
    meets no item's features."""
    found_ML = np.full((profiles_MF.shape[0], branches_NL.shape[1]), -1)
    chosen_M = np.zeros(len(found_ML), np.int64)
    parent_N = np.zeros(len(branches_NL), np.int64)
    for level in range(branches_NL.shape[1]):
        paths, branch_N = np.unique(
            np.column_stack([parent_N, branches_NL[:, level]]), axis=0, return_inverse=True
        )  # fmt: skip
        branch_N = branch_N.ravel()
        members_PN = sp.csr_matrix(
            (np.ones(len(branch_N)), (branch_N, np.arange(len(branch_N)))),
            shape=(len(paths), len(branch_N)),
        )
        centres_PF = _unit(members_PN @ features_NF)
        for start in range(0, len(found_ML), _AT_ONCE):
            near = (profiles_MF[start : start + _AT_ONCE] @ centres_PF.T).tocsr()
            near.sort_indices()
            for row in range(near.shape[0]):
                part = slice(near.indptr[row], near.indptr[row + 1])
                below = paths[near.indices[part], 0] == chosen_M[start + row]
                branches, values = near.indices[part][below], near.data[part][below]
                if len(values) and values.max() > 0:
                    chosen_M[start + row] = branches[values.argmax()]
                    found_ML[start + row, level] = paths[chosen_M[start + row], 1]
                else:  # nowhere above either: a branch that is near has a branch that is near
                    chosen_M[start + row] = -1
        parent_N = branch_N
    return found_ML


def _fill_up(branches_NL: np.ndarray, rows: np.ndarray) -> None:
    """Give each of these items the leaf that holds fewest so far."""
    leaves, sizes = np.unique(branches_NL[branches_NL[:, 0] >= 0], axis=0, return_counts=True)
    room = [(size, leaf) for leaf, size in enumerate(sizes.tolist())]
    heapq.heapify(room)
    for row in rows:
        size, leaf = room[0]
        branches_NL[row] = leaves[leaf]
        heapq.heapreplace(room, (size + 1, leaf))


def _number_in_leaves(places_NL: np.ndarray, first: int, counts_N: np.ndarray, seed: int) -> None:
    """Number the new items of a leaf on from its old ones, the most taken first, equal ones in a
    seeded order."""
    _, leaf_N = np.unique(places_NL[:, :-1], axis=0, return_inverse=True)
    leaf_N = leaf_N.ravel()
    following = np.zeros(leaf_N.max() + 1, np.int64)
    np.maximum.at(following, leaf_N[:first], places_NL[:first, -1] + 1)
    new = np.arange(first, len(places_NL))
    new = new[keyed_permutation(len(new), seed, _LEAF_STREAM, first)]
    for row in new[np.argsort(-counts_N[new], kind="stable")]:
        places_NL[row, -1] = following[leaf_N[row]]
        following[leaf_N[row]] += 1


def _unit(rows_PF: sp.csr_matrix) -> sp.csr_matrix:
    """Rows of length 1; rows of zeros stay."""
    lengths = np.sqrt(np.asarray(rows_PF.multiply(rows_PF).sum(axis=1)).ravel())
    return (
        sp.diags(np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)) @ rows_PF
    ).tocsr()
