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
        raise ValueError(f"items {clash[0]} and {other} have the same sub-words: give them distinct codes")
    return end_item


def pruned(trie: Trie, num_users: int, user_index: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What excluding items takes from each user's trie: (dead_end, dead_node), both bool [num_users, M].

    `dead_end` marks nodes whose item is excluded, `dead_node` those below which no item is left, so that a beam never walks
    into an empty branch and the list stays full. `user_index` and `items` name the excluded pairs; repeats are fine.
    """
    dead_end_UM = np.zeros((num_users, trie.num_nodes), bool)
    dead_end_UM[user_index, trie.item_node[items]] = True
    dead_node_UM = np.zeros((num_users, trie.num_nodes), bool)
    users, nodes = np.nonzero(dead_end_UM)
    has_end = trie.end_item >= 0
    # A node dies when its own item is excluded (or absent) and all of its children are dead: leaves first, then upwards.
    for level in range(trie.depth, 0, -1):
        first, last = trie.level_offsets[level], trie.level_offsets[level + 1]
        here = (nodes >= first) & (nodes < last)
        level_users, level_nodes = users[here], nodes[here]
        own = ~has_end[level_nodes] | dead_end_UM[level_users, level_nodes]
        candidates_U, candidates_M = level_users[own], level_nodes[own]
        alive = _has_live_child(trie, dead_node_UM, candidates_U, candidates_M)
        dying_U, dying_M = candidates_U[~alive], candidates_M[~alive]
        dead_node_UM[dying_U, dying_M] = True
        above = np.unique(np.stack([dying_U, trie.parent[dying_M]], axis=1), axis=0)
        users = np.concatenate([users[~here], above[:, 0]])
        nodes = np.concatenate([nodes[~here], above[:, 1]])
    return dead_end_UM, dead_node_UM


def _has_live_child(trie: Trie, dead_node_UM: np.ndarray, users: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    counts = trie.num_children[nodes]
    owner = np.repeat(np.arange(len(nodes)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    children = trie.first_child[nodes][owner] + within
    live = ~dead_node_UM[users[owner], children]
    return np.bincount(owner[live], minlength=len(nodes)) > 0
