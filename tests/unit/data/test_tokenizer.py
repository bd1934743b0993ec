"""Words: their sub-words are those of the whole text, a function of the catalogue alone, for any
fast tokenizer."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.numbering.numbering import number
from genrec_shards.sequences import Sequences, offsets_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartTokenizerFast, PreTrainedTokenizerFast
from transformers.utils import logging

from genrec_dist.data.tokenizer import load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import (
    BOS_WORD,
    EOS_WORD,
    FIRST_MASK_WORD,
    WordTable,
    build_words,
    item_text,
    mask_tokens,
    user_text,
)

logging.set_verbosity_error()

ITEM_CODES = [str(code) for code in (1, 12, 123, 2, 21, 7, 99, 1000, 12101)]
USER_CODES = [str(code) for code in (3, 33, 22363)]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {
    f"{role}_token": f"<{text}>"
    for role, text in (("bos", "s"), ("pad", "pad"), ("eos", "/s"), ("mask", "mask"))
}
CORPUS = ["the items user 12 liked in 2019 were seen again _ _1 item user"] * 3 + [
    str(n) for n in range(60)
]


def sequences(items: list[list[int]], num_items: int) -> Sequences:
    users, ids = ([str(row + 1) for row in range(size)] for size in (len(items), num_items))
    flat = np.concatenate(items).astype(np.int32)
    return Sequences(flat, offsets_of(np.array([len(row) for row in items])), users, ids)


def bart_style(directory):
    """A byte-level BPE as BART's: the text is cut into letters, digits and the rest before BPE sees
    it."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    ends = (("</s>", 2), ("<s>", 0))
    backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    names = {**NAMES, "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return load_tokenizer(directory)


def bart_class(directory):
    """transformers' own BartTokenizerFast, from a vocabulary and merges made here."""
    backend = bart_style(directory / "style").backend_tokenizer
    vocab_file, merges_file = backend.model.save(str(directory))
    vocab = json.loads(Path(vocab_file).read_text())
    merges = [tuple(line.split(" ")) for line in Path(merges_file).read_text().splitlines()[1:]]
    BartTokenizerFast(vocab=vocab, merges=merges).save_pretrained(directory / "bart")
    return load_tokenizer(directory / "bart")


@pytest.fixture(scope="module", params=["trained", "large", "bart-style", "bart-class"])
def tokenizer(request, tmp_path_factory):
    if request.param in ("trained", "large"):
        return train_tokenizer(ITEM_CODES, 270 if request.param == "trained" else 1024)
    make = bart_style if request.param == "bart-style" else bart_class
    return make(tmp_path_factory.mktemp(request.param))


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def tokens_of(words: WordTable, word: int) -> list[int]:
    return words.tokens[words.offsets[word] : words.offsets[word + 1]].tolist()


def test_the_table_holds_each_word_as_the_tokenizer_alone_gives_it(tokenizer):
    words = build_words(tokenizer, ITEM_CODES, USER_CODES)
    assert words.tokens.dtype == np.int32
    assert tokens_of(words, BOS_WORD) == [tokenizer.bos_token_id]
    assert tokens_of(words, EOS_WORD) == [tokenizer.eos_token_id]
    assert tokens_of(words, FIRST_MASK_WORD) == [tokenizer.mask_token_id]
    items, users = (
        [tokenizer.encode(f" {kind}_{code}", add_special_tokens=False) for code in codes]
        for kind, codes in (("item", ITEM_CODES), ("user", USER_CODES))
    )
    rows = np.arange(len(items)), np.arange(len(users))
    assert [tokens_of(words, word) for word in words.item_words(rows[0])] == items
    assert [tokens_of(words, word) for word in words.user_words(rows[1])] == users
    assert len(words.offsets) == 3 + len(ITEM_CODES) + len(USER_CODES) + 1
    assert (words.lengths == np.diff(words.offsets)).all()
    assert words.longest_item == max(map(len, items))
    assert words.longest_user == max(map(len, users))
    assert build_words(tokenizer, ITEM_CODES, []).longest_user == 0
    # Items of which one is another's prefix have different tokens.
    tokens, offsets = words.tokens_of_items()
    assert [tokens[start:end].tolist() for start, end in pairwise(offsets)] == items
    assert (offsets[0], offsets[-1]) == (0, len(tokens))
    assert len(set(map(tuple, items))) == len(items)
    # The leading space is part of the first sub-word.
    for text in [item_text(code) for code in ITEM_CODES] + [user_text(code) for code in USER_CODES]:
        first = tokenizer.tokenize(text)[0]
        assert first.startswith("Ġ")  # a space in the alphabet of byte-level BPE
        assert len(first) > 1


@given(
    rows=st.lists(st.integers(0, len(ITEM_CODES) - 1), max_size=12),
    user=st.integers(0, len(USER_CODES) - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_sentence_is_the_concatenation_of_its_words(tokenizer, rows, user):
    words = build_words(tokenizer, ITEM_CODES, USER_CODES)
    text = user_text(USER_CODES[user]) + "".join(item_text(ITEM_CODES[row]) for row in rows)
    joined = [*words.user_words(np.array([user])), *words.item_words(np.array(rows, np.int64))]
    expected = [token for word in joined for token in tokens_of(words, int(word))]
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) in (
        expected,
        [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id],
    )


@given(
    code=st.text(
        st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8
    )
)
@settings(max_examples=60, deadline=None)
def test_decoding_gives_the_word_back_whatever_its_letters(tokenizer, code):
    for text in (item_text(code), user_text(code)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_large_vocabulary_makes_each_item_one_token_and_a_small_one_shares_pieces():
    codes = [str(code) for code in range(1, 301)]
    large = build_words(train_tokenizer(codes, 4096), codes, ["1"])
    assert (np.diff(large.tokens_of_items()[1]) == 1).all()
    small = build_words(train_tokenizer(codes, 280), codes, ["1"])
    assert small.longest_item > 1


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"tokens\.vocab_size 260: at least 261 are needed"):
        train_tokenizer(ITEM_CODES, 260)
    with pytest.raises(ValueError, match="at least 264 are needed"):
        train_tokenizer(ITEM_CODES, 263, num_masks=4)
    assert len(train_tokenizer(ITEM_CODES, 264, num_masks=4)) == 264


@pytest.mark.parametrize("numbering", ["random", "train-order"])
def test_the_tokenizer_is_byte_identical_when_held_out_interactions_change(numbering):
    rng = np.random.default_rng(0)
    # Users 0..3 together hold the whole catalogue in training, so it stays whatever the held-out
    # items are.
    first = [[*rng.permutation(40).tolist(), *rng.integers(40, size=2).tolist()] for _ in range(4)]
    other = [[*row[:-2], *rng.integers(40, size=2).tolist()] for row in first]
    assert first != other
    tables = []
    for items in (first, other):
        codes = number(sequences(items, 40), numbering, 5)
        trained = train_tokenizer(codes.item_codes, 300, num_masks=2)
        words = build_words(trained, codes.item_codes, codes.user_codes, 2)
        arrays = words.tokens.tobytes(), words.offsets.tobytes()
        tables.append((trained.backend_tokenizer.to_str(), *arrays))
    assert tables[0] == tables[1]


def test_training_a_tokenizer_gives_the_same_bytes_in_every_process():
    codes = [str(code) for code in range(1, 200)]
    program = (
        "import hashlib; from genrec_dist.data.tokenizer import train_tokenizer as train; "
        "text = train([str(c) for c in range(1, 200)], 400).backend_tokenizer.to_str(); "
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    done = run_python(program, PYTHONHASHSEED="7", TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr
    ours = [train_tokenizer(codes, 400).backend_tokenizer.to_str() for _ in range(3)]
    hashes = {hashlib.sha256(text.encode()).hexdigest() for text in ours}
    assert hashes == {done.stdout.strip().splitlines()[-1]}


def test_numbered_masks_are_single_tokens_in_trained_and_loaded_tokenizers(tmp_path):
    trained = train_tokenizer(ITEM_CODES, 300, num_masks=3)
    plain = bart_style(tmp_path / "plain")
    loaded = load_tokenizer(tmp_path / "plain", num_masks=3)
    assert len(loaded) == len(plain) + 2
    for tokenizer in (trained, loaded):
        masks = mask_tokens(tokenizer, 3)
        assert len(set(masks)) == 3
        assert masks[0] == tokenizer.mask_token_id
        assert tokenizer.encode(" item_1<mask_2>", add_special_tokens=False)[-1] == masks[2]
        words = build_words(tokenizer, ITEM_CODES, USER_CODES, 3)
        assert [tokens_of(words, FIRST_MASK_WORD + j) for j in range(3)] == [
            [token] for token in masks
        ]
        assert words.first_item_word == FIRST_MASK_WORD + 3
        with pytest.raises(ValueError, match="no <mask_3>: it was made for fewer than 4 masks"):
            build_words(tokenizer, ITEM_CODES, USER_CODES, 4)
    assert mask_tokens(plain, 1) == [plain.mask_token_id]


def test_a_saved_tokenizer_loads_back_the_same_and_can_gain_masks(tmp_path):
    trained = train_tokenizer(ITEM_CODES, 300, num_masks=3)
    trained.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, 3)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    more = load_tokenizer(tmp_path, 5)
    assert mask_tokens(more, 5)[:3] == mask_tokens(trained, 3)
    assert {"<mask_1>", "<mask_2>", "<mask_3>", "<mask_4>"} <= set(more.all_special_tokens)
    fewer = load_tokenizer(tmp_path, 1)
    assert {"<mask_1>", "<mask_2>"} <= set(fewer.all_special_tokens)


def test_words_are_neither_padded_nor_cut_by_what_a_tokenizer_was_saved_with(tmp_path):
    trained = train_tokenizer(ITEM_CODES, 262)
    expected = build_words(trained, ITEM_CODES, USER_CODES)
    trained.backend_tokenizer.enable_padding()
    trained.backend_tokenizer.enable_truncation(3)
    trained.save_pretrained(tmp_path)
    words = build_words(load_tokenizer(tmp_path), ITEM_CODES, USER_CODES)
    assert np.array_equal(words.tokens, expected.tokens)
    assert np.array_equal(words.offsets, expected.offsets)


def test_rows_outside_the_tables_are_named():
    words = build_words(train_tokenizer(ITEM_CODES, 300), ITEM_CODES, USER_CODES)
    for bad in (-1, len(ITEM_CODES)):
        with pytest.raises(ValueError, match=f"item row {bad} is outside the table of 9 items"):
            words.item_words(np.array([0, bad, 2]))
    for bad in (-1, len(USER_CODES)):
        with pytest.raises(ValueError, match=f"user row {bad} is outside the table of 3 users"):
            words.user_words(np.array([0, bad]))
    assert words.item_words(np.zeros(0, np.int32)).size == 0


def test_a_word_names_its_row_in_its_own_id_table_and_zero_in_the_other():
    words = build_words(train_tokenizer(ITEM_CODES, 300, num_masks=2), ITEM_CODES, USER_CODES, 2)
    every_word = np.arange(2 + 2 + 9 + 3)
    assert words.item_rows_of_words(every_word).tolist() == [0] * 4 + list(range(1, 10)) + [0] * 3
    assert words.user_rows_of_words(every_word).tolist() == [0] * 13 + [1, 2, 3]


def refusal(name) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_tokenizer_names_what_it_cannot_load_and_two_ways_out(tmp_path):
    for name in ("broken", "empty", "no-vocabulary"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "no-vocabulary" / "config.json").write_text(
        '{"model_type": "bart", "vocab_size": 60}'
    )
    assert refusal(tmp_path / "no-vocabulary").startswith(f"tokens.tokenizer {tmp_path}/no-vocab")
    for name in (tmp_path / "none", tmp_path / "broken", tmp_path / "empty"):
        message = refusal(name)
        assert message.startswith(f"tokens.tokenizer {name}: ")
        assert "give its directory" in message
        assert "set tokens.tokenizer to null" in message


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    backend = train_tokenizer(ITEM_CODES, 300).backend_tokenizer
    names = {role: text for role, text in NAMES.items() if role != "mask_token"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    assert "it has no mask_token" in refusal(tmp_path)


def test_a_word_without_tokens_is_named(tmp_path):
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate([*SPECIALS, "1"])}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    with pytest.raises(ValueError, match="no token for the word ' item_2'"):
        build_words(tokenizer, ["1", "2"], ["1"])


@pytest.mark.parametrize("code", ["a</s>b", "<mask>", "12<s>"])
def test_an_id_that_spells_a_special_token_is_named(code):
    tokenizer = train_tokenizer(ITEM_CODES, 400)
    with pytest.raises(ValueError, match=f"item_{code}.*special token"):
        build_words(tokenizer, [*ITEM_CODES, code], USER_CODES)
