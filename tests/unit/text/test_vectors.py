"""Vectors of texts: from each source, leak-free, and made once."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.prepare import prepare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genrec_dist.config.load import load_recipe
from genrec_dist.text.similarity import text_rows
from genrec_dist.text.vectors import item_vectors
from genrec_dist.training.run import train

NOBODY = 65534
TEXTS = [
    "red nail polish", "blue nail polish", "soft hair brush", "hair dryer", "", "lip balm of honey",
    "honey soap", "travel hair brush",
]  # fmt: skip


def prepared(folder: Path, users: list[list[int]], texts: list[str] = TEXTS) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"u{user} {' '.join(f'i{item}' for item in row)}" for user, row in enumerate(users)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    rows = [f"i{item},{text}" for item, text in enumerate(texts)]
    (folder / "items.csv").write_text("\n".join(["item,title", *rows]) + "\n")
    return prepare(folder / "log.txt", folder / "data", items=folder / "items.csv", overwrite=True)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return prepared(tmp_path, [list(range(8)), list(range(7, -1, -1))])


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_no_interaction_changes_what_texts_say(tmp_path: Path, seed: int, num_users: int) -> None:
    """The catalogue is the same, and who takes what how often is drawn anew."""
    dice = random.Random(seed)
    users = [dice.choices(range(8), k=dice.randint(3, 9)) for _ in range(num_users)]
    one = prepared(tmp_path / "one", [list(range(8))])
    other = prepared(tmp_path / f"{seed}-{num_users}", [dice.sample(range(8), 8), *users])
    assert one.sequences.sequences_hash() != other.sequences.sequences_hash()
    assert (
        text_rows(one, "words").toarray().tobytes() == text_rows(other, "words").toarray().tobytes()
    )
    assert item_vectors(one, "factors").tobytes() == item_vectors(other, "factors").tobytes()


def test_vectors_are_made_once_for_the_same_texts_and_source(dataset: Dataset) -> None:
    vectors = item_vectors(dataset, "factors")
    assert vectors.shape == (8, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 0, 1, 1, 1], rtol=1e-5)
    (made,) = (dataset.path / "text").iterdir()
    before = made.stat().st_mtime_ns
    assert item_vectors(dataset, "factors").tobytes() == vectors.tobytes()
    assert made.stat().st_mtime_ns == before
    content = made.read_bytes()
    changed = prepared(dataset.path.parent, [list(range(8))], [*TEXTS[:-1], "a comb"])
    made.parent.mkdir()
    made.write_bytes(content)  # of other texts
    assert item_vectors(changed, "factors").tobytes() != vectors.tobytes()
    (made,) = {*made.parent.iterdir()} - {made}
    made.write_bytes(made.read_bytes()[:40])
    with pytest.raises(DataError, match=r"\.safetensors: damaged .*remove it, it is made again"):
        item_vectors(changed, "factors")


def test_where_nothing_can_be_kept_vectors_are_made_each_time() -> None:
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        dataset = prepared(Path(folder), [list(range(8))], TEXTS)
        vectors = item_vectors(dataset, "factors")
        shutil.rmtree(dataset.path / "text")
        dataset.path.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)  # root may write everywhere
        try:
            assert item_vectors(dataset, "factors").tobytes() == vectors.tobytes()
        finally:
            os.seteuid(user)
        assert not (dataset.path / "text").exists()
        dataset.path.chmod(0o755)


def test_a_source_that_is_none_and_a_catalogue_without_texts_are_refused(
    dataset: Dataset, tiny_data: Path, tmp_path: Path
) -> None:
    from genrec_shards.dataset import load_dataset

    with pytest.raises(ValueError, match="text source 'nothing': choose words, factors, wordllama"):
        item_vectors(dataset, "nothing")
    with pytest.raises(ValueError, match="its items have no texts: prepare it again with --items"):
        item_vectors(load_dataset(tiny_data), "factors")
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: weights are read from safetensors"):
        item_vectors(dataset, str(tmp_path))


def test_a_training_that_will_end_with_an_unknown_source_does_not_begin(
    tiny_recipe: Path,
) -> None:
    with pytest.raises(ValueError, match="text source 'wrods': choose words, factors, wordllama"):
        train(load_recipe(tiny_recipe, ["decode=hybrid", "text=wrods"]))
    assert not (tiny_recipe.parent / "run" / "events.jsonl").exists()


def test_what_all_texts_share_is_taken_off(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an encoder, here one that needs no package, whose vectors have a large part in common."""
    found = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    monkeypatch.setattr("genrec_dist.text.vectors._encode", lambda texts, _: found + 100)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text("[]")
    vectors = item_vectors(dataset, str(tmp_path / "model"))
    centred = found - found.mean(0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[[0, 1, 2, 3, 5, 6, 7]], expected, atol=1e-4)
    assert not vectors[4].any()


def test_wordllama_brings_words_of_like_meaning_together(tmp_path: Path) -> None:
    pytest.importorskip("wordllama", reason="extra `text` is not installed")
    texts = [
        "shampoo for dry hair",
        "conditioner and hair care",
        "steel cutting saw",
        "hammer",
        "",
        *TEXTS[5:],
    ]
    vectors = item_vectors(prepared(tmp_path, [list(range(8))], texts), "wordllama")
    assert vectors.shape == (8, 256)
    assert not vectors[4].any()
    near = vectors @ vectors.T
    assert near[0].argsort()[-2] == 1  # no word but `hair` in common
    assert near[2].argsort()[-2] == 3  # none at all


def test_a_sentence_transformers_directory_gives_its_own_vectors(
    dataset: Dataset, tmp_path: Path
) -> None:
    """A tiny real model: mean of the last states over the tokens of each text."""
    library = pytest.importorskip("sentence_transformers", reason="extra `text` is not installed")
    from sentence_transformers import models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.split()})
    rules = Tokenizer(WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(words) + 2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = models.Transformer(str(tmp_path / "bert"))
    pooling = models.Pooling(16, pooling_mode="mean")
    library.SentenceTransformer(modules=[transformer, pooling]).save(str(tmp_path / "model"))
    vectors = item_vectors(dataset, str(tmp_path / "model"))
    texts = [text for text in TEXTS if text]
    with torch.inference_mode():
        states = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state for text in texts]
    means = np.stack([state[0].mean(0).numpy() for state in states])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    means -= means.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(np.delete(vectors, 4, axis=0), means, atol=1e-4)
