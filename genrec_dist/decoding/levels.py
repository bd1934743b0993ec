"""The trie as a search reads it, on its device."""

# M nodes, V tokens of a level, X pairs

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from genrec_dist.decoding.trie import Pruned, Trie

MOST_BEAMS = 1024
"""Up to so many beams a static search knows how many children they can have; for more it makes room
for a whole level."""
FEWEST_PAIRS = 256
"""What a static search pads the exclusions of a level to at least."""


class Levels:
    """The trie as a search reads it, level by level, on its device."""

    def __init__(
        self,
        trie: Trie,
        device: torch.device,
        forced: np.ndarray | None = None,
        siblings: tuple[Trie, np.ndarray] | None = None,
    ):
        """Copy the trie to the device.

        Args:
            trie: The items that may be listed.
            device: Where the search runs.
            forced: bool [M], nodes after which the next token or end has probability 1; None: none.
            siblings: For a softmax over siblings the whole catalogue's trie and int64 [M], each
                node's number in it; None: a softmax over tokens.
        """

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        offsets, num_nodes = list(pairwise(trie.level_offsets)), trie.num_nodes
        self.depth = trie.depth
        self.sentinel = num_nodes
        """The node of a beam that has no child to go to: nothing ends or continues there."""
        self.token = move(np.append(trie.token.astype(np.int64).clip(min=0), 0))
        self.first_child = move(np.append(trie.first_child, 0))
        self.num_children = move(np.append(trie.num_children, 0))
        self.end_item = move(np.append(trie.end_item.astype(np.int64), -1))
        self.num_nodes = np.diff(trie.level_offsets).tolist()
        self.first_nodes = trie.level_offsets[:-1].tolist()
        self.has_ends = [bool((trie.end_item[first:last] >= 0).any()) for first, last in offsets]
        self.most_children = [
            np.cumsum(-np.sort(-trie.num_children[first:last]))[:MOST_BEAMS].tolist()
            for first, last in offsets
        ]
        """Children that 1, 2, ... different nodes of a level can have together, by level."""
        self.tokens: list[Tensor] = []
        """int64 [V_l], distinct tokens below the nodes of each level, ascending."""
        column = np.zeros(num_nodes + 1, np.int64)
        for first, last in [*offsets[1:], (num_nodes, num_nodes)]:
            tokens, columns = np.unique(trie.token[first:last], return_inverse=True)
            self.tokens.append(move(tokens.astype(np.int64)))
            column[first:last] = columns + 1
        self.whole_node: Tensor | None = None
        """int64 [M + 1], for a softmax over siblings."""
        if siblings is not None:
            whole, numbers = siblings
            number_among = numbers - whole.first_child[whole.parent[numbers]]
            column[1:-1] = number_among[1:] + 1
            self.whole_node = move(np.append(numbers, 0))
        self.column = move(column)
        """int64 [M + 1], column of a node's token in the logits of the level above; 0 is `</s>`.
        Of a softmax over siblings its number among them."""
        self.forced = None if forced is None else move(np.append(forced, True))
        chosen = np.ones(num_nodes, bool) if forced is None else ~forced
        self.needs_logits = [bool(chosen[first:last].any()) for first, last in offsets]
        self.num_decoded = max(
            (n + 1 for n, needed in enumerate(self.needs_logits) if needed), default=0
        )
        """Levels from the root on after which no logits are needed any more."""
        self.num_prefix = 0
        """Levels from the root on at whose one node no item ends and one token follows."""
        while self.num_prefix < trie.depth and trie.num_children[self.num_prefix] == 1:
            if trie.end_item[self.num_prefix] >= 0:
                break
            self.num_prefix += 1
        self.prefix = self.token[1 : self.num_prefix + 1]
        """int64, the tokens that all items begin with."""
        self.prefix_columns = column[1 : self.num_prefix + 1].tolist()
        """Their columns."""


@dataclass(frozen=True)
class Excluded:
    """What excluding items takes from the users' tries, by level, on the searcher's device."""

    ends: list[tuple[Tensor, ...]]
    """(users, nodes) int64 [X] where the item of a node with children is excluded."""
    pruned: list[tuple[Tensor, ...]]
    """(users, parents, nodes) int64 [X] of the nodes below which nothing is left."""


def exclude_by_level(trie: Trie, pairs: Pruned, device: torch.device, padded: bool) -> Excluded:
    """Sort what `prune_items` gave by level and move it to the device.

    Args:
        trie: What the pairs were pruned from.
        pairs: Of all users of a batch.
        device: The searcher's.
        padded: To few sizes, so that shapes recur; pairs of padding name a node, -1, that no beam
            is at.
    """

    def move(column: np.ndarray, fill: int) -> Tensor:
        size = max(FEWEST_PAIRS, 1 << (len(column) - 1).bit_length()) if padded else len(column)
        filled = np.full(size, fill, np.int64)
        filled[: len(column)] = column
        return torch.from_numpy(filled).to(device, non_blocking=True)

    def by_level(*columns: np.ndarray) -> list[tuple[Tensor, ...]]:
        level_X = trie.level_of(columns[-1])
        return [
            tuple(move(column[level_X == level], -(n == 1)) for n, column in enumerate(columns))
            for level in range(trie.depth + 1)
        ]

    # Where a leaf's item is excluded the leaf itself is pruned; but where all of the trie is one
    # item, the search starts at its leaf.
    inner = (trie.num_children[pairs.end_nodes] > 0) | (trie.num_nodes == trie.depth + 1)
    parents = trie.parent[pairs.pruned_nodes]
    return Excluded(
        ends=by_level(pairs.end_users[inner], pairs.end_nodes[inner]),
        pruned=by_level(pairs.pruned_users, parents, pairs.pruned_nodes),
    )
