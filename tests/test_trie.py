"""The trie against a dict of dicts, and what exclusion takes from it against brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec_dist.trie import Trie, build_trie, pruned

Word = tuple[int, ...]
PREFIXES: list[Word] = [(5,), (5, 0), (5, 0, 0), (0,), (5, 7), (3, 3, 3, 3)]

catalogues = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=40, unique=True
)


def ragged(items: list[Word]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([token for item in items for token in item], np.int32)
    return tokens, np.cumsum([0, *map(len, items)])


def nodes_of_dict(items: list[Word]) -> dict[Word, int]:
    """Every prefix -> the item that ends there, -1 for none."""
    ends = {prefix: -1 for item in items for prefix in [item[:n] for n in range(len(item) + 1)]}
    return ends | {item: row for row, item in enumerate(items)}


def prefix_of(trie: Trie, node: int) -> Word:
    tokens = []
    while node > 0:
        tokens.append(int(trie.token[node]))
        node = int(trie.parent[node])
    return tuple(reversed(tokens))


@settings(max_examples=100, deadline=None)
@given(catalogues)
@example(PREFIXES)
def test_the_trie_equals_a_dict_of_prefixes(items: list[Word]) -> None:
    trie, ends = build_trie(*ragged(items)), nodes_of_dict(items)
    prefixes = [prefix_of(trie, node) for node in range(trie.num_nodes)]
    # Level by level, and by the smaller token within: the order that ties are broken by.
    assert prefixes == sorted(ends, key=lambda prefix: (len(prefix), prefix))
    assert [ends[prefix] for prefix in prefixes] == trie.end_item.tolist()
    assert [prefixes[node] for node in trie.item_node] == items
    for node, prefix in enumerate(prefixes):
        children = range(trie.first_child[node], trie.first_child[node] + trie.num_children[node])
        assert [prefixes[child] for child in children] == [p for p in prefixes if p and p[:-1] == prefix]
        assert all(trie.parent[child] == node for child in children)
    assert trie.depth == max(map(len, items))
    for level in range(trie.depth + 1):
        first, last = trie.level_offsets[level : level + 2]
        assert {len(prefix) for prefix in prefixes[first:last]} == {level}
        assert trie.widest_fan(level) == max(trie.num_children[first:last])
    assert trie.level_offsets[-1] == trie.num_nodes


@settings(max_examples=30, deadline=None)
@given(catalogues, st.data())
def test_the_same_tokens_twice_are_refused_by_both_rows(items: list[Word], data: st.DataObject) -> None:
    again = data.draw(st.integers(0, len(items) - 1))
    with pytest.raises(ValueError) as refusal:
        build_trie(*ragged([*items, items[again]]))
    assert f"item rows {again} and {len(items)} " in str(refusal.value)
    assert "choose another tokenizer" in str(refusal.value)


@settings(max_examples=150, deadline=None)
@given(catalogues, st.data())
def test_pruned_equals_brute_force(items: list[Word], data: st.DataObject) -> None:
    trie = build_trie(*ragged(items))
    pair = st.tuples(st.integers(0, 2), st.integers(0, len(items) - 1))
    pairs = data.draw(st.lists(pair, max_size=2 * len(items)))  # repeats come by themselves
    if data.draw(st.booleans()):
        pairs += [(1, item) for item in range(len(items))]  # a user who has everything
    found = pruned(trie, np.array([user for user, _ in pairs], np.int64), np.array([i for _, i in pairs], np.int64))
    prefixes = [prefix_of(trie, node) for node in range(trie.num_nodes)]
    dead, ends = [], []
    for user in range(3):
        excluded = {items[i] for u, i in pairs if u == user}
        left = [item for item in items if item not in excluded]
        for node, prefix in enumerate(prefixes):
            if prefix in excluded:
                ends.append((user, node))
            if node and not any(item[: len(prefix)] == prefix for item in left):
                dead.append((user, node))
    assert list(zip(found.end_users, found.end_nodes, strict=True)) == ends
    assert list(zip(found.dead_users, found.dead_nodes, strict=True)) == dead


def test_nothing_excluded_prunes_nothing() -> None:
    found = pruned(build_trie(*ragged(PREFIXES)), np.empty(0, np.int64), np.empty(0, np.int32))
    assert len(found.end_users) == len(found.dead_users) == 0


def test_rows_of_many_users_do_not_overflow() -> None:
    """Pairs are packed as user * nodes + node: int32 rows must not wrap."""
    trie = build_trie(np.arange(100_000, dtype=np.int32), np.arange(100_001))
    found = pruned(trie, np.full(2, 99_999, np.int32), np.array([3, 99_999], np.int32))
    assert found.end_users.tolist() == found.dead_users.tolist() == [99_999, 99_999]
    assert found.dead_nodes.tolist() == [4, 100_000]


@pytest.mark.slow
def test_a_million_items_build_in_seconds() -> None:
    """Prints, asserts only what is built: time is the machine's."""
    rng = np.random.default_rng(0)
    codes = rng.permutation(1_000_000)
    tokens = np.stack([np.full(len(codes), 1000), codes // 1000, codes % 1000], axis=1).astype(np.int32)
    start = time.perf_counter()
    trie = build_trie(tokens.ravel(), np.arange(0, 3_000_001, 3))
    seconds = time.perf_counter() - start
    size = sum(getattr(trie, name).nbytes for name in trie.__dataclass_fields__)
    print(f"10^6 items: {trie.num_nodes:,} nodes in {seconds:.2f} s, {size / 1e6:.0f} MB")
    assert trie.num_nodes == 1 + 1 + 1000 + 1_000_000
    assert (trie.end_item[trie.item_node] == np.arange(1_000_000)).all()
