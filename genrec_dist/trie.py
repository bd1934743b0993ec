"""The trie of all items as token strings, in arrays."""

# N items, M nodes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trie:
    """Nodes are numbered level by level, siblings side by side in order of token; node 0 is the root.

    The children of node m are `first_child[m] .. first_child[m] + num_children[m] - 1`. An item ends at a node: the end of
    item (`</s>`) is a child like any other, kept in `end_item` because there is at most one a node.
    """

    token: np.ndarray
    """int32 [M], token on the edge into a node; -1 at the root."""
    first_child: np.ndarray
    """int64 [M]."""
    num_children: np.ndarray
    """int64 [M], the end of item not counted."""
    end_item: np.ndarray
    """int32 [M], the item that ends at a node, -1 for none."""
    parent: np.ndarray
    """int64 [M], -1 at the root."""
    item_node: np.ndarray
    """int64 [N], the node where each item ends."""
    level_offsets: np.ndarray
    """int64 [levels + 1], first node of each level."""

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    @property
    def depth(self) -> int:
        """Sub-words of the longest item."""
        return len(self.level_offsets) - 2

    def widest_fan(self, level: int) -> int:
        """Most children of one node of a level."""
        return int(self.num_children[self.level_offsets[level] : self.level_offsets[level + 1]].max(initial=0))


def build_trie(tokens: np.ndarray, offsets: np.ndarray) -> Trie:
    """Trie of items given as ragged token arrays: tokens int32 [total], offsets int64 [N + 1].

    Level by level: the distinct (parent, token) pairs of a level are its nodes, so nothing loops over items.
    Raises ValueError if two items have the same tokens.
    """
    lengths = np.diff(offsets)
    num_items = len(lengths)
    node_of_item = np.zeros(num_items, np.int64)
    node_tokens, parents, level_offsets = [np.array([-1], np.int64)], [np.array([-1], np.int64)], [0, 1]
    span = int(tokens.max(initial=0)) + 1
    for level in range(int(lengths.max(initial=0))):
        here = np.flatnonzero(lengths > level)
        keys = node_of_item[here] * span + tokens[offsets[here] + level]
        distinct, inverse = np.unique(keys, return_inverse=True)
        node_of_item[here] = level_offsets[-1] + inverse
        node_tokens.append(distinct % span)
        parents.append(distinct // span)
        level_offsets.append(level_offsets[-1] + len(distinct))
    parent = np.concatenate(parents)
    num_nodes = len(parent)
    num_children = np.bincount(parent[1:], minlength=num_nodes)
    return Trie(
        token=np.concatenate(node_tokens).astype(np.int32),
        first_child=1 + np.concatenate([[0], np.cumsum(num_children)[:-1]]),
        num_children=num_children,
        end_item=_end_items(node_of_item, num_nodes),
        parent=parent,
        item_node=node_of_item,
        level_offsets=np.array(level_offsets),
    )


def _end_items(node_of_item: np.ndarray, num_nodes: int) -> np.ndarray:
    end_item = np.full(num_nodes, -1, np.int32)
    items = np.arange(len(node_of_item), dtype=np.int32)
    end_item[node_of_item] = items
    clash = np.flatnonzero(end_item[node_of_item] != items)
    if len(clash):
        other = end_item[node_of_item[clash[0]]]
        raise ValueError(
            f"item rows {clash[0]} and {other} (items.parquet) have the same sub-words: "
            "prepare with another numbering or choose another tokenizer"
        )
    return end_item


@dataclass(frozen=True)
class Pruned:
    """What excluding items takes from the tries of a batch of users: pairs (user, node), ascending, each once.

    Pairs and not a table of users times nodes: a user loses some dozens of nodes, a catalogue has millions.
    """

    end_users: np.ndarray
    """int64 [E], users of the closed ends."""
    end_nodes: np.ndarray
    """int64 [E], nodes whose item is excluded."""
    dead_users: np.ndarray
    """int64 [X], users of the dead nodes."""
    dead_nodes: np.ndarray
    """int64 [X], nodes below which no item is left, so that a beam never walks into an empty branch."""


def pruned(trie: Trie, user_index: np.ndarray, items: np.ndarray) -> Pruned:
    """Exclude the pairs (user_index int64 [P], items int [P]); repeats are fine.

    Leaves first, then upwards: a node dies when its own item is excluded or absent and all of its children are dead.
    """
    num_nodes = trie.num_nodes
    ends = np.unique(np.asarray(user_index, np.int64) * num_nodes + trie.item_node[items])
    level_of_ends = np.searchsorted(trie.level_offsets, ends % num_nodes, side="right") - 1
    dead_of_levels = []
    childless = np.empty(0, np.int64)  # pairs of this level whose children are all dead
    for level in range(trie.depth, 0, -1):
        closed = ends[level_of_ends == level]
        leaves = closed[trie.num_children[closed % num_nodes] == 0]
        endless = childless[trie.end_item[childless % num_nodes] < 0]
        dead = np.concatenate([leaves, endless, np.intersect1d(childless, closed, assume_unique=True)])
        dead_of_levels.append(dead)
        users, nodes = np.divmod(dead, num_nodes)
        parents, lost = np.unique(users * num_nodes + trie.parent[nodes], return_counts=True)
        childless = parents[lost == trie.num_children[parents % num_nodes]]
    dead = np.sort(np.concatenate([np.empty(0, np.int64), *dead_of_levels]))
    return Pruned(*np.divmod(ends, num_nodes), *np.divmod(dead, num_nodes))
