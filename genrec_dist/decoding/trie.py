"""The trie of all items as token strings, in arrays."""

# N items, M nodes, T tokens of the longest item

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from genrec_shards.atomic import atomic_file
from genrec_shards.sequences import offsets_of
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
    a node has at most one.

    32 bytes per node and 8 per item, in memory and in a file: 40 MB for 10^6 codes of up to 7
    digits in BART's sub-words, which have 1.01 nodes per item. `build_trie` has an example.
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

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def level_of(self, nodes: np.ndarray) -> np.ndarray:
        """Level of each node, 0 for the root; -1 for node -1."""
        return np.searchsorted(self.level_offsets, nodes, side="right") - 1

    def item_paths(self) -> np.ndarray:
        """int64 [N, T], the nodes of each item from below the root on; -1 after its last one."""
        paths_NT = np.full((len(self.item_node), self.depth), -1)
        node_N, level_N = self.item_node.copy(), self.level_of(self.item_node)
        for level in range(self.depth, 0, -1):
            deep = np.flatnonzero(level_N >= level)
            paths_NT[deep, level - 1] = node_N[deep]
            node_N[deep] = self.parent[node_N[deep]]
        return paths_NT


def build_trie(tokens: np.ndarray, offsets: np.ndarray) -> Trie:
    """The trie of items given as ragged token arrays.

    Level by level: the distinct (parent, token) pairs of a level are its nodes, so nothing loops
    over items.

    Args:
        tokens: int32 [total], the items' tokens one after another.
        offsets: int64 [N + 1], item i has `tokens[offsets[i]:offsets[i + 1]]`.

    Raises:
        ValueError: Two items have the same tokens.
    """
    # Items 0: (5, 7), 1: (5,), 2: (5, 6), 3: (8,).
    #   level 1: pairs (0, 5) (0, 5) (0, 5) (0, 8) -> nodes 1: (0, 5), 2: (0, 8)
    #            node_of_item = [1, 1, 1, 2]; items 1 and 3 end here
    #   level 2: pairs (1, 7) (1, 6) of items 0 and 2 -> nodes 3: (1, 6), 4: (1, 7)
    #            node_of_item = [4, 1, 3, 2]
    # token         = [-1,  5,  8,  6,  7]     parent        = [-1, 0, 0, 1, 1]
    # end_item      = [-1,  1,  3,  2,  0]     level_offsets = [0, 1, 3, 5]
    # num_children  = [ 2,  2,  0,  0,  0]     first_child   = [1, 3, 5, 5, 5]
    lengths = np.diff(offsets)
    node_of_item = np.zeros(len(lengths), np.int64)
    node_tokens, parents, level_offsets = [np.array([-1])], [np.array([-1])], [0, 1]
    base = int(tokens.max(initial=0)) + 1
    for level in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > level)
        pairs = node_of_item[longer] * base + tokens[offsets[longer] + level]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        node_of_item[longer] = level_offsets[-1] + inverse
        node_tokens.append(distinct % base)
        parents.append(distinct // base)
        level_offsets.append(level_offsets[-1] + len(distinct))

    token, parent = np.concatenate(node_tokens).astype(np.int32), np.concatenate(parents)
    end_item = np.full(len(parent), -1, np.int32)
    items = np.arange(len(lengths), dtype=np.int32)
    end_item[node_of_item] = items
    clash = np.flatnonzero(end_item[node_of_item] != items)
    if len(clash):
        other = end_item[node_of_item[clash[0]]]
        raise ValueError(
            f"item rows {clash[0]} and {other} (items.parquet) have the same sub-words: "
            "prepare with another numbering or choose another tokenizer"
        )
    return _with_children(token, parent, end_item, node_of_item, np.array(level_offsets))


def _with_children(
    token: np.ndarray,
    parent: np.ndarray,
    end_item: np.ndarray,
    item_node: np.ndarray,
    level_offsets: np.ndarray,
) -> Trie:
    """The trie of nodes that are in the order of their parents."""
    num_children = np.bincount(parent[1:], minlength=len(parent))
    return Trie(
        token=token,
        first_child=1 + offsets_of(num_children)[:-1],
        num_children=num_children,
        end_item=end_item,
        parent=parent,
        item_node=item_node,
        level_offsets=level_offsets,
    )


def restrict(trie: Trie, keep_rows: np.ndarray) -> Trie:
    """The trie of some of its items alone; rows keep their numbers.

    Args:
        trie: The whole; rows that it leaves out already stay out.
        keep_rows: int [n] item rows, repeats are fine.

    Raises:
        ValueError: A row is outside the catalogue, or no item is left.
    """
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
    kept = ends.copy()
    kept[0] = True
    for level in range(trie.depth, 0, -1):
        nodes = slice(trie.level_offsets[level], trie.level_offsets[level + 1])
        kept[trie.parent[nodes][kept[nodes]]] = True
    # Nodes below which nothing is left go, the others close up in their order.
    number = offsets_of(kept)  # of a kept node: how many are before it
    end_item = np.where(ends, trie.end_item, -1)[kept].astype(np.int32)
    item_node = np.full(num_items, -1)
    item_node[end_item[end_item >= 0]] = np.flatnonzero(end_item >= 0)
    parent = np.concatenate([[-1], number[trie.parent[kept][1:]]])
    level_offsets = number[trie.level_offsets]
    num_levels = 1 + int(np.flatnonzero(np.diff(level_offsets))[-1])
    return _with_children(
        trie.token[kept], parent, end_item, item_node, level_offsets[: num_levels + 1]
    )


def forced_nodes(trie: Trie) -> np.ndarray:
    """bool [M], nodes with one continuation: a single child, or the end of an item and no child."""
    return trie.num_children + (trie.end_item >= 0) == 1


def forced_tokens(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of the items are the only continuation in the trie, and which ends are.

    Args:
        trie: No item may be left out of it.

    Returns:
        (bool [total], one item's tokens after another's by row; bool [N], of `</s>`)
    """
    forced_M, paths_NT = forced_nodes(trie), trie.item_paths()
    return forced_M[trie.parent[paths_NT[paths_NT >= 0]]], forced_M[trie.item_node]


def nodes_in_whole(whole: Trie, part: Trie) -> np.ndarray:
    """int64 [M of part], the numbers that the nodes of `restrict(whole, ...)` have in `whole`."""
    nodes = np.zeros(part.num_nodes, np.int64)
    paths_NT = part.item_paths()
    nodes[paths_NT[paths_NT >= 0]] = whole.item_paths()[:, : part.depth][paths_NT >= 0]
    return nodes


@dataclass(frozen=True)
class Pruned:
    """What excluding items takes from the tries of a batch of users: pairs (user, node), ascending,
    each once.

    Pairs and not a table of users times nodes: a user loses some dozens of nodes, a catalogue has
    millions.
    """

    end_users: np.ndarray
    """int64 [E], users of the excluded ends."""
    end_nodes: np.ndarray
    """int64 [E], nodes whose item is excluded."""
    pruned_users: np.ndarray
    """int64 [X], users of the pruned nodes."""
    pruned_nodes: np.ndarray
    """int64 [X], nodes below which no item is left, so that no beam goes into an empty branch."""


def prune_items(trie: Trie, users: np.ndarray, items: np.ndarray) -> Pruned:
    """Which ends and nodes of the trie each user loses with their excluded items.

    Leaves first, then upwards: a node is pruned when its own item is excluded or absent and all of
    its children are pruned.

    Args:
        trie: Items that it leaves out may be excluded, too.
        users: int64 [P], index of a user in the batch.
        items: int [P], row of an item that this user must not be listed; repeats are fine.
    """
    # In the trie of `build_trie`'s example user 0 excludes items 0 and 2, user 1 item 1; a pair
    # (user, node) is the number 5 user + node.
    #   ends     = (0, 3) (0, 4) (1, 1) = [3, 4, 6]
    #   level 2: 3 and 4 are leaves: pruned; their parent (0, 1) has lost 2 of 2 children
    #   level 1: (0, 1) has no child left but its item 1 stays; (1, 1) keeps its children: none
    #   pruned   = (0, 3) (0, 4)
    num_nodes = trie.num_nodes
    nodes = trie.item_node[items]
    ends = np.unique((np.asarray(users, np.int64) * num_nodes + nodes)[nodes >= 0])
    level_of_ends = trie.level_of(ends % num_nodes)
    pruned = [np.empty(0, np.int64)]
    childless = np.empty(0, np.int64)  # pairs of this level whose children are all pruned
    for level in range(trie.depth, 0, -1):
        closed = ends[level_of_ends == level]
        leaves = closed[trie.num_children[closed % num_nodes] == 0]
        endless = childless[trie.end_item[childless % num_nodes] < 0]
        both = np.intersect1d(childless, closed, assume_unique=True)
        pruned.append(np.concatenate([leaves, endless, both]))
        users, nodes = np.divmod(pruned[-1], num_nodes)
        parents, counts = np.unique(users * num_nodes + trie.parent[nodes], return_counts=True)
        childless = parents[counts == trie.num_children[parents % num_nodes]]
    end_users, end_nodes = np.divmod(ends, num_nodes)
    pruned_users, pruned_nodes = np.divmod(np.sort(np.concatenate(pruned)), num_nodes)
    return Pruned(
        end_users=end_users,
        end_nodes=end_nodes,
        pruned_users=pruned_users,
        pruned_nodes=pruned_nodes,
    )


def hash_of_words(tokens: np.ndarray, offsets: np.ndarray) -> str:
    """sha256 (hex) of the arrays that a trie is built of, as `build_trie` takes them."""
    digest = hashlib.sha256(b"genrec item words 1\n")
    digest.update(np.ascontiguousarray(offsets, "<i8").data)
    digest.update(np.ascontiguousarray(tokens, "<i4").data)
    return digest.hexdigest()


def save_trie(trie: Trie, path: str | Path, *, numbering_hash: str, words_hash: str) -> None:
    """Write the trie as safetensors, whole or not at all.

    Args:
        trie: What to write.
        path: The file.
        numbering_hash: Of the data's numbering.
        words_hash: `hash_of_words` of the items; `load_trie` refuses the file for others.
    """
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

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{path}: {reason}: delete it, it is rebuilt from the catalogue")

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise refuse(f"not readable ({error})") from None
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise refuse(f"format {version}, this version reads {FORMAT_VERSION}")
    for key, expected in (("numbering_hash", numbering_hash), ("words_hash", words_hash)):
        found = metadata.get(key, "")
        if found != expected:
            raise refuse(f"its {key} is {found[:12]!r}, the model's {expected[:12]!r}")
    names = {field.name for field in fields(Trie)}
    if set(arrays) != names or _hash_of_arrays(arrays) != metadata.get("arrays_hash"):
        raise refuse("damaged (its arrays are not those that were written)")
    return Trie(**arrays)


def _hash_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    # safetensors checks its header alone: a flipped bit in a node would come back as another
    # catalogue.
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
