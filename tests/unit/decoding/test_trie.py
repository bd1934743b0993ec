"""The trie against a dict of dicts, what exclusion takes from it against brute force, and its
file."""

from __future__ import annotations

import shutil
import time
from itertools import pairwise
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
from genrec_dist.inference import load as run_module
from genrec_dist.inference.load import load_run, make_searcher

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
        assert [prefixes[child] for child in children] == [
            p for p in prefixes if p and p[:-1] == prefix
        ]
        assert all(trie.parent[child] == node for child in children)
    assert trie.depth == max(map(len, items))
    for level in range(trie.depth + 1):
        first, last = trie.level_offsets[level : level + 2]
        assert {len(prefix) for prefix in prefixes[first:last]} == {level}
        assert trie.widest_fan(level) == max(trie.num_children[first:last])
    assert trie.level_offsets[-1] == trie.num_nodes


@settings(max_examples=30, deadline=None)
@given(catalogues, st.data())
def test_the_same_tokens_twice_are_refused_by_both_rows(
    items: list[Word], data: st.DataObject
) -> None:
    again = data.draw(st.integers(0, len(items) - 1))
    with pytest.raises(ValueError) as refusal:
        build_trie(*ragged([*items, items[again]]))
    assert f"item rows {again} and {len(items)} " in str(refusal.value)
    assert "choose another tokenizer" in str(refusal.value)


@settings(max_examples=150, deadline=None)
@given(catalogues, st.data())
def test_pruned_equals_brute_force(items: list[Word], data: st.DataObject) -> None:
    assert_pruned_equals_brute_force(
        build_trie(*ragged(items)), items, items, draw_pairs(items, data)
    )


def draw_pairs(items: list[Word], data: st.DataObject) -> list[tuple[int, int]]:
    """(user of three, item row); repeats come by themselves."""
    pair = st.tuples(st.integers(0, 2), st.integers(0, len(items) - 1))
    pairs = data.draw(st.lists(pair, max_size=2 * len(items)))
    if data.draw(st.booleans()):
        pairs += [(1, item) for item in range(len(items))]  # a user who has everything
    return pairs


def assert_pruned_equals_brute_force(
    trie: Trie, items: list[Word], in_trie: list[Word], pairs: list[tuple[int, int]]
) -> None:
    """`in_trie`: those of the catalogue's items that the trie holds."""
    found = prune_items(
        trie,
        np.array([user for user, _ in pairs], np.int64),
        np.array([i for _, i in pairs], np.int64),
    )
    prefixes = [prefix_of(trie, node) for node in range(trie.num_nodes)]
    dead, ends = [], []
    for user in range(3):
        excluded = {items[i] for u, i in pairs if u == user}
        left = [item for item in in_trie if item not in excluded]
        for node, prefix in enumerate(prefixes):
            if prefix in excluded and prefix in in_trie:
                ends.append((user, node))
            if node and not any(item[: len(prefix)] == prefix for item in left):
                dead.append((user, node))
    assert list(zip(found.end_users, found.end_nodes, strict=True)) == ends
    assert list(zip(found.pruned_users, found.pruned_nodes, strict=True)) == dead


def assert_same(one: Trie, other: Trie) -> None:
    for name, array in one.arrays().items():
        twin = getattr(other, name)
        assert array.dtype == twin.dtype, name
        np.testing.assert_array_equal(array, twin, err_msg=name)


@settings(max_examples=150, deadline=None)
@given(catalogues, st.data())
@example(PREFIXES, None)
def test_a_restricted_trie_is_that_of_the_kept_items(
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


@settings(max_examples=100, deadline=None)
@given(catalogues, st.data())
def test_pruned_knows_only_what_the_trie_holds(items: list[Word], data: st.DataObject) -> None:
    keep = data.draw(st.sets(st.integers(0, len(items) - 1), min_size=1))
    cut = restrict(build_trie(*ragged(items)), np.array(sorted(keep)))
    assert_pruned_equals_brute_force(
        cut, items, [items[row] for row in keep], draw_pairs(items, data)
    )


def test_keeping_everything_changes_nothing() -> None:
    trie = build_trie(*ragged(PREFIXES))
    assert_same(restrict(trie, np.arange(len(PREFIXES), dtype=np.int32)), trie)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no item is left to list: allow more items"),
        ([0, 6], "item row 6 is outside"),
        ([-1], "item row -1 is"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restrict(build_trie(*ragged(PREFIXES)), np.array(rows, np.int64))


def test_nothing_excluded_prunes_nothing() -> None:
    found = prune_items(build_trie(*ragged(PREFIXES)), np.empty(0, np.int64), np.empty(0, np.int32))
    assert len(found.end_users) == len(found.pruned_users) == 0


def test_rows_of_many_users_do_not_overflow() -> None:
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


def test_a_saved_trie_comes_back_equal(saved: Path) -> None:
    trie = build_trie(*ragged(PREFIXES))
    assert_same(load(saved), trie)
    assert 0 < saved.stat().st_size - trie.num_bytes < 2000  # a header beside the arrays


def test_a_trie_of_another_numbering_or_of_other_words_is_refused(saved: Path) -> None:
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


def test_a_damaged_file_is_refused_whatever_is_damaged(saved: Path) -> None:
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


def test_a_file_of_another_form_is_refused(saved: Path) -> None:
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


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_run_brings_its_trie_and_none_is_built(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(run)
    built = build_trie(*loaded.words.tokens_of_items())
    monkeypatch.setattr(run_module, "build_trie", lambda *_: pytest.fail("it was built"))
    assert_same(load_run(run).searcher.trie, built)


def test_an_old_run_without_a_trie_gets_one(run: Path) -> None:
    trie = load_run(run).searcher.trie
    (run / "best" / TRIE_FILE).unlink()
    assert_same(load_run(run).searcher.trie, trie)


def test_a_run_with_the_wrong_trie_is_refused(run: Path, saved: Path) -> None:
    path = run / "best" / TRIE_FILE
    shutil.copyfile(saved, path)
    with pytest.raises(ValueError, match=f"{path}: its numbering_hash is 'abab"):
        load_run(run)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path}: not readable .*: delete it, it is rebuilt"):
        load_run(run)
    path.unlink()
    load_run(run)


def test_a_loaded_searcher_reads_texts(tiny_run: Path) -> None:
    """What mode `free` needs: every item's sub-words are that item's text."""
    loaded = load_run(tiny_run)
    tokens, offsets = loaded.words.tokens_of_items()
    spelled = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
    texts = loaded.searcher.texts
    assert texts is not None
    assert texts.rows(spelled).tolist() == list(range(loaded.words.num_items))


def test_a_searcher_over_some_items(tiny_run: Path) -> None:
    loaded = load_run(tiny_run)
    searcher = make_searcher(loaded.model, loaded.words, "cpu", items=np.array([3, 7]))
    assert np.flatnonzero(searcher.trie.item_node >= 0).tolist() == [3, 7]
    assert_same(make_searcher(loaded.model, loaded.words, "cpu").trie, loaded.searcher.trie)


@pytest.mark.slow
def test_a_million_items_build_in_seconds() -> None:
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
