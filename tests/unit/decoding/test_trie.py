"""The trie against a dict of dicts, what exclusion takes from it against brute force, and its
file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from genrec_dist.decoding.trie import (
    FORMAT_VERSION,
    TRIE_FILE,
    Trie,
    build_trie,
    hash_of_words,
    load_trie,
    prune_items,
    restrict,
    save_trie,
)

Word = tuple[int, ...]
PREFIXES: list[Word] = [(5,), (5, 0), (5, 0, 0), (0,), (5, 7), (3, 3, 3, 3)]

catalogues = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    min_size=1,
    max_size=40,
    unique=True,
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


@settings(max_examples=40, deadline=None)
@given(catalogues)
@example(PREFIXES)
def test_build_trie_equals_a_dict_of_prefixes(items: list[Word]) -> None:
    trie, ends = build_trie(*ragged(items)), nodes_of_dict(items)
    prefixes = [prefix_of(trie, node) for node in range(trie.num_nodes)]
    # Level by level, and by the smaller token within: the order that ties are broken by.
    assert prefixes == sorted(ends, key=lambda prefix: (len(prefix), prefix))
    assert [ends[prefix] for prefix in prefixes] == trie.end_item.tolist()
    assert [prefixes[node] for node in trie.item_node] == items
    for node, prefix in enumerate(prefixes):
        children = range(trie.first_child[node], trie.first_child[node] + trie.num_children[node])
        assert [prefixes[child] for child in children] == [
            p for p in prefixes if p and p[:-1] == prefix
        ]
        assert all(trie.parent[child] == node for child in children)
    assert trie.depth == max(map(len, items))
    for level in range(trie.depth + 1):
        first, last = trie.level_offsets[level : level + 2]
        assert {len(prefix) for prefix in prefixes[first:last]} == {level}
    assert trie.level_offsets[-1] == trie.num_nodes


@settings(max_examples=30, deadline=None)
@given(catalogues, st.data())
def test_build_trie_refuses_the_same_tokens_twice_by_both_rows(
    items: list[Word], data: st.DataObject
) -> None:
    again = data.draw(st.integers(0, len(items) - 1))
    with pytest.raises(ValueError) as refusal:
        build_trie(*ragged([*items, items[again]]))
    assert f"item rows {again} and {len(items)} " in str(refusal.value)
    assert "choose another tokenizer" in str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(catalogues, st.data())
def test_prune_items_equals_brute_force(items: list[Word], data: st.DataObject) -> None:
    """Of a whole trie and of one that holds some of the items alone; three users."""
    pair = st.tuples(st.integers(0, 2), st.integers(0, len(items) - 1))
    pairs = data.draw(st.lists(pair, max_size=2 * len(items)))
    if data.draw(st.booleans()):
        pairs += [(1, item) for item in range(len(items))]  # a user who has everything
    trie, keep = build_trie(*ragged(items)), set(range(len(items)))
    if data.draw(st.booleans()):
        keep = data.draw(st.sets(st.integers(0, len(items) - 1), min_size=1))
        trie = restrict(trie, np.array(sorted(keep)))
    users, rows = np.array(pairs, np.int64).reshape(-1, 2).T
    found = prune_items(trie, users, rows)
    in_trie = [items[row] for row in sorted(keep)]
    prefixes = [prefix_of(trie, node) for node in range(trie.num_nodes)]
    pruned, ends = [], []
    for user in range(3):
        excluded = {items[i] for u, i in pairs if u == user}
        left = [item for item in in_trie if item not in excluded]
        for node, prefix in enumerate(prefixes):
            if prefix in excluded and prefix in in_trie:
                ends.append((user, node))
            if node and not any(item[: len(prefix)] == prefix for item in left):
                pruned.append((user, node))
    assert list(zip(found.end_users, found.end_nodes, strict=True)) == ends
    assert list(zip(found.pruned_users, found.pruned_nodes, strict=True)) == pruned


def assert_same(one: Trie, other: Trie) -> None:
    for name, array in one.arrays().items():
        twin = getattr(other, name)
        assert array.dtype == twin.dtype, name
        np.testing.assert_array_equal(array, twin, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(catalogues, st.data())
@example(PREFIXES, None)
def test_restrict_gives_the_trie_of_the_kept_items(
    items: list[Word], data: st.DataObject | None
) -> None:
    """All but the rows, which keep their numbers; also when restricted again."""
    rows = st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=2 * len(items))
    trie = build_trie(*ragged(items))
    keep = data.draw(rows) if data else [1, 5]
    cut = restrict(trie, np.array(keep))
    kept = sorted(set(keep))
    alone = build_trie(*ragged([items[row] for row in kept]))
    for name in ("token", "first_child", "num_children", "parent", "level_offsets"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(alone, name), err_msg=name)
        assert getattr(cut, name).dtype == getattr(trie, name).dtype
    assert cut.end_item.dtype == np.int32
    assert cut.end_item.tolist() == [kept[row] if row >= 0 else -1 for row in alone.end_item]
    assert [int(cut.item_node[row]) for row in kept] == alone.item_node.tolist()
    assert all(cut.item_node[row] == -1 for row in range(len(items)) if row not in kept)
    again = data.draw(rows) if data else [5, 0]
    if both := sorted(set(again) & set(kept)):
        assert_same(restrict(cut, np.array(again)), restrict(trie, np.array(both)))
    else:
        with pytest.raises(ValueError, match="no item is left"):
            restrict(cut, np.array(again))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no item is left to list: allow more items"),
        ([0, 6], "item row 6 is outside"),
        ([-1], "item row -1 is"),
    ],
)
def test_restrict_refuses_rows_that_cannot_be_kept(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restrict(build_trie(*ragged(PREFIXES)), np.array(rows, np.int64))


def test_prune_items_of_many_users_does_not_overflow() -> None:
    """Pairs are packed as user * nodes + node: int32 rows must not wrap."""
    trie = build_trie(np.arange(100_000, dtype=np.int32), np.arange(100_001))
    found = prune_items(trie, np.full(2, 99_999, np.int32), np.array([3, 99_999], np.int32))
    assert found.end_users.tolist() == found.pruned_users.tolist() == [99_999, 99_999]
    assert found.pruned_nodes.tolist() == [4, 100_000]


# Its file.

NUMBERING = "ab" * 32


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model" / TRIE_FILE
    arrays = ragged(PREFIXES)
    save_trie(
        build_trie(*arrays), path, numbering_hash=NUMBERING, words_hash=hash_of_words(*arrays)
    )
    assert [file.name for file in path.parent.iterdir()] == [TRIE_FILE]
    return path


def load(path: Path, numbering_hash: str = NUMBERING, items: list[Word] = PREFIXES) -> Trie:
    return load_trie(path, numbering_hash=numbering_hash, words_hash=hash_of_words(*ragged(items)))


def test_load_trie_gives_what_save_trie_wrote(saved: Path) -> None:
    trie = build_trie(*ragged(PREFIXES))
    assert_same(load(saved), trie)
    assert 0 < saved.stat().st_size - trie.num_bytes < 2000  # a header beside the arrays


def test_load_trie_refuses_another_numbering_or_other_words(saved: Path) -> None:
    with pytest.raises(
        ValueError,
        match=f"{saved}: its numbering_hash is 'abababababab', the model's 'cdcd.*: delete it",
    ):
        load(saved, numbering_hash="cd" * 32)
    with pytest.raises(ValueError, match=f"{saved}: its words_hash .*: delete it, it is rebuilt"):
        load(saved, items=[*PREFIXES[:-1], (3, 3, 3, 2)])
    # The same tokens, cut into other words.
    with pytest.raises(ValueError, match="words_hash"):
        load(saved, items=[(5,), (5,), (0, 5, 0, 0), *PREFIXES[3:]])


def test_load_trie_refuses_a_damaged_file_whatever_is_damaged(saved: Path) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    flipped = [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(header, len(whole), 7)
    ]
    for bad in [b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"x" * 500, *flipped]:
        saved.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"trie\.safetensors: .*: delete it, it is rebuilt"
        ) as refusal:
            load(saved)
        assert "\n" not in str(refusal.value)
    saved.write_bytes(whole)
    load(saved)


def test_load_trie_refuses_a_file_of_another_form(saved: Path) -> None:
    with safe_open(saved, "np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["format_version"] == FORMAT_VERSION
    for changed, message in (
        ({**metadata, "format_version": "999"}, "format 999, this version reads 1"),
        (None, "format None, this version reads 1"),
    ):
        save_file(arrays, saved, metadata=changed)
        with pytest.raises(ValueError, match=message):
            load(saved)
    del arrays["parent"]
    save_file(arrays, saved, metadata=metadata)
    with pytest.raises(ValueError, match="damaged"):
        load(saved)


@pytest.mark.slow
def test_build_trie_of_a_million_items() -> None:
    """Prints, asserts only what is built: time is the machine's."""
    dice = np.random.default_rng(0)
    # As BART spells ` item_1234567`: two sub-words, then `1`, `234` and `567`, each a sub-word of
    # its own.
    chunks = [
        f"{code:,}".split(",") for code in dice.choice(9_999_999, 1_000_000, replace=False) + 1
    ]
    number = {
        chunk: 7 + n for n, chunk in enumerate(sorted({chunk for item in chunks for chunk in item}))
    }
    tokens, offsets = ragged([(5, 6, *(number[chunk] for chunk in item)) for item in chunks])
    start = time.perf_counter()
    trie = build_trie(tokens, offsets)
    seconds = time.perf_counter() - start
    print(f"10^6 items: {trie.num_nodes:,} nodes in {seconds:.2f} s, {trie.num_bytes / 1e6:.0f} MB")
    assert trie.depth == 5
    assert (trie.end_item[trie.item_node] == np.arange(1_000_000)).all()
    assert trie.num_bytes == 32 * trie.num_nodes + 8 * 1_000_000 + 8 * 7
