"""The trie of all items as token strings, in arrays."""

# N items, M nodes

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from genrec_shards.atomic import atomic_file
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT_VERSION = "1"
TRIE_FILE = "trie.safetensors"
"""Its name beside a model."""


@dataclass(frozen=True)
class Trie:
    """Nodes are numbered level by level, siblings side by side in order of token; node 0 is the
    root.

    The children of node m are `first_child[m] .. first_child[m] + num_children[m] - 1`. An item
    ends at a node: the end of item (`</s>`) is a child like any other, kept in `end_item` because
    there is at most one a node.

    32 bytes a node and 8 an item, in memory and in a file: 40 MB for 10^6 codes of up to 7 digits
    in BART's sub-words, which have 1.01 nodes an item."""

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
    """int64 [N], the node where each item ends, -1 for an item that the trie leaves out."""
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
        return int(
            self.num_children[self.level_offsets[level] : self.level_offsets[level + 1]].max(
                initial=0
            )
        )

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def build_trie(tokens: np.ndarray, offsets: np.ndarray) -> Trie:
    """Trie of items given as ragged token arrays: tokens int32 [total], offsets int64 [N + 1].

    Level by level: the distinct (parent, token) pairs of a level are its nodes, so nothing loops
    over items. Raises ValueError if two items have the same tokens."""
    lengths = np.diff(offsets)
    num_items = len(lengths)
    node_of_item = np.zeros(num_items, np.int64)
    node_tokens, parents, level_offsets = (
        [np.array([-1], np.int64)],
        [np.array([-1], np.int64)],
        [0, 1],
    )
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
    return Trie(
        token=np.concatenate(node_tokens).astype(np.int32),
        **_children(parent),
        end_item=_end_items(node_of_item, len(parent)),
        parent=parent,
        item_node=node_of_item,
        level_offsets=np.array(level_offsets),
    )


def _children(parent: np.ndarray) -> dict[str, np.ndarray]:
    """`num_children` and `first_child` of nodes that lie in the order of their parents."""
    num_children = np.bincount(parent[1:], minlength=len(parent))
    return {
        "num_children": num_children,
        "first_child": 1 + np.concatenate([[0], np.cumsum(num_children)[:-1]]),
    }


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


def one_way(trie: Trie) -> np.ndarray:
    """bool [M], nodes from which one way leads on: a single child, or the end of an item and no
    child."""
    return trie.num_children + (trie.end_item >= 0) == 1


def certain_tokens(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """(bool [total], bool [N]): which tokens of the items, one after another by row, and which ends
    stand alone at their node.

    No item may be left out of the trie.
    """
    alone_M = one_way(trie)
    depth_N = np.searchsorted(trie.level_offsets, trie.item_node, side="right") - 1
    offsets = np.concatenate([[0], np.cumsum(depth_N)])
    certain = np.empty(offsets[-1], bool)
    node_N = trie.item_node
    for level in range(trie.depth - 1, -1, -1):
        here = depth_N > level
        node_N = np.where(here, trie.parent[node_N], node_N)
        certain[offsets[:-1][here] + level] = alone_M[node_N[here]]
    return certain, alone_M[trie.item_node]


def nodes_in(whole: Trie, part: Trie) -> np.ndarray:
    """int64 [M of part], where the nodes of what `restrict` left stand in the trie it was taken
    of."""
    nodes = np.zeros(part.num_nodes, np.int64)
    kept = np.flatnonzero(part.item_node >= 0)
    nodes[part.item_node[kept]] = whole.item_node[kept]
    for level in range(part.depth, 0, -1):
        here = slice(part.level_offsets[level], part.level_offsets[level + 1])
        nodes[part.parent[here]] = whole.parent[nodes[here]]
    return nodes


def restrict(trie: Trie, keep_rows: np.ndarray) -> Trie:
    """The trie of these items alone (item rows, int [n], repeats are fine); rows keep their
    numbers.

    Rows that the trie leaves out already stay out. Raises ValueError for a row outside the
    catalogue, or if no item is left."""
    keep_rows = np.asarray(keep_rows, np.int64)
    num_items = len(trie.item_node)
    outside = keep_rows[(keep_rows < 0) | (keep_rows >= num_items)]
    if len(outside):
        raise ValueError(f"item row {outside[0]} is outside the catalogue of {num_items} items")
    kept_nodes = trie.item_node[keep_rows]
    kept_nodes = kept_nodes[kept_nodes >= 0]
    if not len(kept_nodes):
        raise ValueError("no item is left to list: allow more items or block fewer")
    ends = np.zeros(trie.num_nodes, bool)
    ends[kept_nodes] = True
    alive = ends.copy()
    alive[0] = True
    for level in range(trie.depth, 0, -1):
        nodes = slice(trie.level_offsets[level], trie.level_offsets[level + 1])
        alive[trie.parent[nodes][alive[nodes]]] = True
    # Nodes below which nothing is left go, the others close up in their order.
    before = np.concatenate([[0], np.cumsum(alive)])
    parent = np.concatenate([[-1], before[trie.parent[alive][1:]]])
    level_offsets = before[trie.level_offsets]
    end_item = np.where(ends, trie.end_item, -1)[alive].astype(np.int32)
    item_node = np.full(num_items, -1)
    item_node[end_item[end_item >= 0]] = np.flatnonzero(end_item >= 0)
    return Trie(
        token=trie.token[alive],
        **_children(parent),
        end_item=end_item,
        parent=parent,
        item_node=item_node,
        level_offsets=level_offsets[: 2 + int(np.flatnonzero(np.diff(level_offsets))[-1])],
    )


def hash_of_words(tokens: np.ndarray, offsets: np.ndarray) -> str:
    """sha256 (hex) of the arrays that a trie is built of, as `build_trie` takes them."""
    digest = hashlib.sha256(b"genrec item words 1\n")
    digest.update(np.ascontiguousarray(offsets, "<i8").data)
    digest.update(np.ascontiguousarray(tokens, "<i4").data)
    return digest.hexdigest()


def save_trie(trie: Trie, path: str | Path, *, numbering_hash: str, words_hash: str) -> None:
    """Write the trie as safetensors, whole or not at all, bound to the numbering and to the words
    (`hash_of_words`)."""
    arrays = {name: np.ascontiguousarray(array) for name, array in trie.arrays().items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "numbering_hash": numbering_hash,
        "words_hash": words_hash,
        "arrays_hash": _hash_of_arrays(arrays),
    }
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def load_trie(path: str | Path, *, numbering_hash: str, words_hash: str) -> Trie:
    """What `save_trie` wrote. Raises ValueError naming the file if it is damaged or belongs to
    another numbering or words."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unfit(path, f"not readable ({error})") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise _unfit(
            path, f"format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    for key, expected in (("numbering_hash", numbering_hash), ("words_hash", words_hash)):
        found = metadata.get(key, "")
        if found != expected:
            raise _unfit(path, f"its {key} is {found[:12]!r}, the model's {expected[:12]!r}")
    if set(arrays) != {field.name for field in fields(Trie)} or _hash_of_arrays(
        arrays
    ) != metadata.get("arrays_hash"):
        raise _unfit(path, "damaged (its arrays are not those that were written)")
    return Trie(**arrays)


def _unfit(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{path}: {reason}: delete it, it is rebuilt from the catalogue")


def _hash_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    # safetensors checks its header alone: a flipped bit in a node would come back as another
    # catalogue.
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Pruned:
    """What excluding items takes from the tries of a batch of users: pairs (user, node), ascending,
    each once.

    Pairs and not a table of users times nodes: a user loses some dozens of nodes, a catalogue has
    millions."""

    end_users: np.ndarray
    """int64 [E], users of the closed ends."""
    end_nodes: np.ndarray
    """int64 [E], nodes whose item is excluded."""
    pruned_users: np.ndarray
    """int64 [X], users of the pruned nodes."""
    pruned_nodes: np.ndarray
    """int64 [X], nodes below which no item is left, so that a beam never walks into an empty
    branch."""


def prune_items(trie: Trie, user_index: np.ndarray, items: np.ndarray) -> Pruned:
    """Exclude the pairs (user_index int64 [P], items int [P]); repeats are fine, and so are items
    that the trie leaves out.

    Leaves first, then upwards: a node is pruned when its own item is excluded or absent and all of its
    children are pruned."""
    num_nodes = trie.num_nodes
    nodes = trie.item_node[items]
    ends = np.unique((np.asarray(user_index, np.int64) * num_nodes + nodes)[nodes >= 0])
    level_of_ends = np.searchsorted(trie.level_offsets, ends % num_nodes, side="right") - 1
    pruned_of_levels = []
    childless = np.empty(0, np.int64)  # pairs of this level whose children are all pruned
    for level in range(trie.depth, 0, -1):
        closed = ends[level_of_ends == level]
        leaves = closed[trie.num_children[closed % num_nodes] == 0]
        endless = childless[trie.end_item[childless % num_nodes] < 0]
        pruned = np.concatenate(
            [leaves, endless, np.intersect1d(childless, closed, assume_unique=True)]
        )
        pruned_of_levels.append(pruned)
        users, nodes = np.divmod(pruned, num_nodes)
        parents, num_pruned = np.unique(users * num_nodes + trie.parent[nodes], return_counts=True)
        childless = parents[num_pruned == trie.num_children[parents % num_nodes]]
    pruned = np.sort(np.concatenate([np.empty(0, np.int64), *pruned_of_levels]))
    return Pruned(*np.divmod(ends, num_nodes), *np.divmod(pruned, num_nodes))
