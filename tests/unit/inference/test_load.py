"""What a run is loaded with, and which data it refuses."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare

from genrec_dist.decoding.trie import TRIE_FILE, Trie, build_trie, hash_of_words, save_trie
from genrec_dist.inference import load as load_module
from genrec_dist.inference.load import LoadedRun, check_numbering, load_run, make_searcher


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("checkpoints", "tensorboard")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=ignored)


def assert_same(one: Trie, other: Trie) -> None:
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)


def test_load_run_reads_its_trie_or_builds_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_trie(*load_run(run).words.tokens_of_items())
    with monkeypatch.context() as patch:
        patch.setattr(load_module, "build_trie", lambda *_: pytest.fail("it was built"))
        assert_same(load_run(run).searcher.trie, built)
    (run / "best" / TRIE_FILE).unlink()  # an old run
    assert_same(load_run(run).searcher.trie, built)


def test_load_run_refuses_the_wrong_trie(run: Path) -> None:
    path, arrays = run / "best" / TRIE_FILE, (np.array([5, 6], np.int32), np.array([0, 1, 2]))
    path.unlink()
    words_hash = hash_of_words(*arrays)
    save_trie(build_trie(*arrays), path, numbering_hash="ab" * 32, words_hash=words_hash)
    with pytest.raises(ValueError, match=f"{path}: its numbering_hash is 'abab"):
        load_run(run)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path}: not readable .*: delete it, it is rebuilt"):
        load_run(run)


def test_loaded_searcher_reads_texts(loaded: LoadedRun) -> None:
    """What mode `free` needs: every item's sub-words are that item's text."""
    tokens, offsets = loaded.words.tokens_of_items()
    spelled = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
    assert loaded.searcher.texts is not None
    assert loaded.searcher.texts.rows(spelled).tolist() == list(range(loaded.words.num_items))


def test_make_searcher_has_the_trie_of_the_run_and_among_some_of_its_items(
    loaded: LoadedRun,
) -> None:
    searcher = make_searcher(loaded.model, loaded.words, "cpu")
    assert_same(searcher.trie, loaded.searcher.trie)
    some = searcher.among(np.array([3, 7]))
    assert np.flatnonzero(some.trie.item_node >= 0).tolist() == [3, 7]


def test_check_numbering_refuses_another_numbering(
    loaded: LoadedRun, dataset: Dataset, tmp_path: Path
) -> None:
    log = dataset.path.parent / "log.txt"
    other = prepare(log, tmp_path / "data", numbering="random", seed=1)
    with pytest.raises(
        ValueError,
        match=r"was trained with numbering .* give --data the directory the run was trained on",
    ):
        check_numbering(loaded, other)
    check_numbering(loaded, dataset)


@pytest.mark.parametrize(
    ("old", "new", "kind"), [(" B", " C", "item"), ("user-", "person-", "user")]
)
def test_check_numbering_refuses_equal_codes_of_other_ids(
    loaded: LoadedRun, dataset: Dataset, tmp_path: Path, old: str, new: str, kind: str
) -> None:
    """As many users and items and the same seed: the codes, and so their hash, are the same."""
    log = (dataset.path.parent / "log.txt").read_text()
    (tmp_path / "log.txt").write_text(log.replace(old, new))
    other = prepare(tmp_path / "log.txt", tmp_path / "data", numbering="random")
    assert other.numbering.numbering_hash() == loaded.model.config.numbering_hash
    with pytest.raises(
        ValueError, match=f"knows {kind} .* give --data the directory the run was trained on"
    ):
        check_numbering(loaded, other)
