"""Codes of items and users that come later: the old ones stay what they are, the new ones fit in
beside them."""

# N items, M of them new, F features, P branches of a level, L levels

import dataclasses

import numpy as np
import scipy.sparse as sp

from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.numbering.balanced_clusters import emptiest_first
from genrec_shards.numbering.cooccurrence import WINDOW, cooccurrences, training_counts
from genrec_shards.numbering.hierarchical_codes import code_texts, places_of_codes
from genrec_shards.numbering.item_text import Descriptions, unit_rows, word_weights
from genrec_shards.numbering.numbering import (
    DESCRIBED,
    HIERARCHICAL,
    Numbering,
    numbers_from,
    places_by_training_order,
)
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
    `semantic` and `combined` by the words of `descriptions`, else, and where these say nothing, by
    the items it is taken near in the training parts, else where there is most room. Users: the
    numbers that follow, in a seeded order, except under `given`. Held-out interactions are not
    looked at."""
    known_items, known_users, seed = len(before.item_codes), len(before.user_codes), before.seed
    if before.name == "given":
        items, users = list(sequences.item_ids), list(sequences.user_ids)
        return dataclasses.replace(before, item_codes=items, user_codes=users)
    new_users, new_items = sequences.num_users - known_users, sequences.num_items - known_items
    user_places = keyed_permutation(new_users, seed, _USER_STREAM, known_users)
    hierarchy = before.hierarchy
    if before.name in HIERARCHICAL:
        assert hierarchy is not None
        places_ML, at_random = _leaves(before, sequences, descriptions)
        items = code_texts(places_ML)
        unseen = int((training_counts(sequences) == 0).sum())
        at_random += hierarchy.placed_at_random
        hierarchy = dataclasses.replace(hierarchy, unseen=unseen, placed_at_random=at_random)
    elif before.name == "random":
        places = keyed_permutation(new_items, seed, _ITEM_STREAM, known_items)
        items = numbers_from(known_items, places)
    else:
        streams = (_UNSEEN_STREAM, known_items)
        places = places_by_training_order(sequences, known_items, seed, *streams)
        items = numbers_from(known_items, places)
    item_codes = [*before.item_codes, *items]
    user_codes = [*before.user_codes, *numbers_from(known_users, user_places)]
    assert all(len(set(codes)) == len(codes) for codes in (item_codes, user_codes))
    return Numbering(before.name, seed, item_codes, user_codes, hierarchy)


def _leaves(
    before: Numbering, sequences: Sequences, descriptions: Descriptions | None
) -> tuple[np.ndarray, int]:
    """(int64[M, L] places of the new items, from 0; how many of them nothing was known of)."""
    known_NL = places_of_codes(before.item_codes)
    first, num_levels = len(known_NL), known_NL.shape[1] - 1
    branches_NL = np.full((sequences.num_items, num_levels), -1)
    branches_NL[:first] = known_NL[:, :-1]
    if before.name in DESCRIBED and descriptions is not None:
        words_NF = word_weights(descriptions.texts)
        branches_NL[first:] = nearest_leaves(words_NF[first:], words_NF[:first], known_NL[:, :-1])
    weights_NN = cooccurrences(sequences, WINDOW)
    # Over the square root of the other's mass, as `neighbour_vectors` weighs: a popular neighbour
    # says less.
    mass_N = np.asarray(weights_NN.sum(axis=1)).ravel()
    weights_NN = (weights_NN @ sp.diags(1 / np.sqrt(mass_N + 1))).tocsr()
    while True:  # a new item beside new items alone follows them a round later
        placed = np.flatnonzero(branches_NL[:, 0] >= 0)
        waiting = np.flatnonzero(branches_NL[:, 0] < 0)
        itself = sp.identity(len(placed), format="csr")
        found = nearest_leaves(weights_NN[waiting][:, placed], itself, branches_NL[placed])
        branches_NL[waiting] = found
        if not (found >= 0).any():
            break
    # The others go, in a seeded order, to the leaves that hold fewest so far.
    unknown = np.flatnonzero(branches_NL[:, 0] < 0)
    unknown = unknown[keyed_permutation(len(unknown), before.seed, _ROOM_STREAM, first)]
    leaves, sizes = np.unique(branches_NL[branches_NL[:, 0] >= 0], axis=0, return_counts=True)
    branches_NL[unknown] = leaves[emptiest_first(sizes, len(unknown))]
    # Numbers follow the old ones of a leaf, the most taken item first, equal ones in a seeded
    # order.
    _, leaf_N = np.unique(branches_NL, axis=0, return_inverse=True)
    leaf_N = leaf_N.ravel()
    following = np.zeros(leaf_N.max() + 1, np.int64)
    np.maximum.at(following, leaf_N[:first], known_NL[:, -1] + 1)
    new = np.arange(first, len(branches_NL))
    new = new[keyed_permutation(len(new), before.seed, _LEAF_STREAM, first)]
    numbers_M = np.zeros(len(new), np.int64)
    for row in new[np.argsort(-training_counts(sequences)[new], kind="stable")]:
        numbers_M[row - first] = following[leaf_N[row]]
        following[leaf_N[row]] += 1
    return np.column_stack([branches_NL[first:], numbers_M]), len(unknown)


def nearest_leaves(
    profiles_MF: sp.csr_matrix, features_NF: sp.csr_matrix, branches_NL: np.ndarray
) -> np.ndarray:
    """int64[M, L]: level by level the branch whose items' features together point most the way a
    profile does; -1 in all levels where a profile meets no item's features.

    Args:
        profiles_MF: of the items to place.
        features_NF: of the items that have a place.
        branches_NL: the branch of each of those at each level.
    """
    # Items 0, 1 and 2 in branches (0, 0), (0, 1) and (1, 0), a profile near item 1: at the first
    # level `paths` are (0, 0) and (0, 1), parent and branch, and path 0 is nearest; at the second
    # level they are (0, 0), (0, 1) and (1, 0), of which those with parent 0 count, and path 1 is
    # nearest: found is (0, 1).
    found_ML = np.full((profiles_MF.shape[0], branches_NL.shape[1]), -1)
    chosen_M = np.zeros(len(found_ML), np.int64)
    parent_N = np.zeros(len(branches_NL), np.int64)
    for level in range(branches_NL.shape[1]):
        pairs_N2 = np.column_stack([parent_N, branches_NL[:, level]])
        paths, branch_N = np.unique(pairs_N2, axis=0, return_inverse=True)
        branch_N = branch_N.ravel()
        members = (np.ones(len(branch_N)), (branch_N, np.arange(len(branch_N))))
        members_PN = sp.csr_matrix(members, shape=(len(paths), len(branch_N)))
        centres_PF = unit_rows(members_PN @ features_NF)
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
                else:  # at the first level: a branch that is near has a branch that is near
                    chosen_M[start + row] = -1
        parent_N = branch_N
    return found_ML
