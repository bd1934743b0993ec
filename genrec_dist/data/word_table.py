"""The words of users and items and their tokens: one table that batches gather from."""

# W words, V tokens of a trimmed vocabulary

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from genrec_shards.readers.documents import read_object
from genrec_shards.sequences import offsets_of

BOS_WORD, EOS_WORD, FIRST_MASK_WORD = 0, 1, 2
HEAD_WORD, TAIL_WORD, SEPARATOR_WORD = BOS_WORD, FIRST_MASK_WORD, FIRST_MASK_WORD + 1
"""The words of a prompt's text have the places of `<s>` and of two masks: what is before a history,
what a decoder row begins with, and what is between two titles. They have any number of tokens."""

VOCABULARY_FILE = "vocabulary.json"
"""Name of a trimmed vocabulary beside its model."""

VOCABULARY_FORMAT = 1


class WordTokenizer(Protocol):
    """What words need of a tokenizer: of transformers' `PreTrainedTokenizerFast`, or
    `LightTokenizer`."""

    backend_tokenizer: Any
    """Of the library tokenizers."""
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    mask_token_id: int
    all_special_ids: list[int]

    def get_vocab(self) -> dict[str, int]: ...


def item_text(code: str) -> str:
    """An item's word; the leading space belongs to its first sub-word, as in BART's tokenizer."""
    return f" item_{code}"


def user_text(code: str) -> str:
    return f" user_{code}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a trimmed model has rows for, in its own numbers: first the output
    vocabulary, then tokens that are only read."""

    tokens: np.ndarray
    """int64 [V], the tokenizer's id of each number; ascending in both parts."""
    num_outputs: int
    """Size of the output vocabulary: tokens of items and `</s>`."""

    @property
    def size(self) -> int:
        return len(self.tokens)

    def numbers(self, tokens: np.ndarray) -> np.ndarray:
        """int32, the model's numbers of the tokenizer's ids. Raises ValueError naming one that was
        not kept."""
        order = np.argsort(self.tokens)
        places = np.searchsorted(self.tokens[order], tokens).clip(max=self.size - 1)
        missing = np.flatnonzero(self.tokens[order][places] != tokens)
        if missing.size:
            raise ValueError(
                f"token {tokens[missing[0]]} of the tokenizer has no row in the model's trimmed "
                "vocabulary: give the tokenizer and the catalogue the model was trained with"
            )
        return order[places].astype(np.int32)

    def hash(self) -> str:
        """sha256 (hex)."""
        head = f"genrec vocabulary {VOCABULARY_FORMAT} {self.num_outputs}\n".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.tokens, "<i8").tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        facts = {
            "format_version": VOCABULARY_FORMAT,
            "num_spoken": self.num_outputs,
            "tokens": self.tokens.tolist(),
        }
        Path(path).write_text(json.dumps(facts), encoding="utf-8")


def load_vocabulary(path: str | Path, expected_hash: str) -> Vocabulary:
    """What `Vocabulary.save` wrote. Raises ValueError naming the file if it is missing, damaged or
    another model's."""
    try:
        facts = read_object(path)
        vocabulary = Vocabulary(np.array(facts["tokens"], np.int64), int(facts["num_spoken"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path}: missing or damaged ({type(error).__name__}): copy the run again, or train "
            "again"
        ) from None
    if vocabulary.hash() != expected_hash:
        raise ValueError(
            f"{path}: not the vocabulary of the model beside it, or damaged: copy the run again, "
            "or train again"
        )
    return vocabulary


@dataclass(frozen=True)
class WordTable:
    """Token ids of every word: `<s>`, `</s>`, the masks, the items by row, the users by row."""

    tokens: np.ndarray
    """int32 [total], the words' token ids one after another."""
    offsets: np.ndarray
    """int64 [W + 1]."""
    num_masks: int
    num_items: int
    num_users: int
    vocabulary: Vocabulary | None = None
    """The token ids are numbers of this trimmed vocabulary; None: the tokenizer's own."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [W], sub-words of each word."""
        return np.diff(self.offsets)

    @property
    def first_item_word(self) -> int:
        return FIRST_MASK_WORD + self.num_masks

    @property
    def first_user_word(self) -> int:
        return self.first_item_word + self.num_items

    def item_words(self, rows: np.ndarray) -> np.ndarray:
        """Words of item rows. Raises ValueError naming a row outside the table."""
        _check_rows(rows, self.num_items, "item")
        return rows.astype(np.int64) + self.first_item_word

    def user_words(self, rows: np.ndarray) -> np.ndarray:
        """Words of user rows. Raises ValueError naming a row outside the table."""
        _check_rows(rows, self.num_users, "user")
        return rows.astype(np.int64) + self.first_user_word

    def item_rows_of_words(self, words: np.ndarray) -> np.ndarray:
        """Rows of the item id table (row + 1) for words, 0 for words that are no items."""
        rows = words - self.first_item_word
        return np.where((rows >= 0) & (rows < self.num_items), rows + 1, 0)

    def user_rows_of_words(self, words: np.ndarray) -> np.ndarray:
        """Rows of the user id table (row + 1) for words, 0 for words that are no users."""
        rows = words - self.first_user_word
        return np.where(rows >= 0, rows + 1, 0)

    def tokens_of_items(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [total], offsets int64 [N + 1]) of the items alone, by row."""
        offsets = self.offsets[self.first_item_word : self.first_user_word + 1]
        return self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0]

    @cached_property
    def longest_item(self) -> int:
        return int(self.lengths[self.first_item_word : self.first_user_word].max())

    @cached_property
    def longest_user(self) -> int:
        return int(self.lengths[self.first_user_word :].max(initial=0))


def _check_rows(rows: np.ndarray, num_rows: int, kind: str) -> None:
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        bad = rows[(rows < 0) | (rows >= num_rows)][0]
        raise ValueError(
            f"{kind} row {bad} is outside the table of {num_rows} {kind}s: prepare and shard again"
        )


def mask_tokens(tokenizer: WordTokenizer, num_masks: int) -> list[int]:
    """Token ids of `<mask>`, `<mask_1>`, ... Raises ValueError if the tokenizer lacks one."""
    vocabulary = tokenizer.get_vocab()
    names = [f"<mask_{j}>" for j in range(1, num_masks)]
    for name in names:
        if name not in vocabulary:
            raise ValueError(
                f"the tokenizer has no {name}: it was made for fewer than {num_masks} masks"
            )
    return [int(tokenizer.mask_token_id), *(vocabulary[name] for name in names)]


def build_words(
    tokenizer: WordTokenizer,
    item_codes: Sequence[str],
    user_codes: Sequence[str],
    num_masks: int = 1,
) -> WordTable:
    """The word table: one pass of the (Rust) tokenizer over each word, then arrays only. Raises
    ValueError where a word has no sub-words or contains a special token; `build_trie` refuses two
    items with the same sub-words."""
    texts = [item_text(code) for code in item_codes] + [user_text(code) for code in user_codes]
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, *mask_tokens(tokenizer, num_masks)]
    token_lists = [[token] for token in specials] + [encoding.ids for encoding in encoded]
    lengths = np.fromiter((len(ids) for ids in token_lists), np.int64, len(token_lists))
    if not lengths.all():
        word = texts[int(np.flatnonzero(lengths == 0)[0]) - len(specials)]
        raise ValueError(f"the tokenizer gives no token for the word {word!r}")
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in token_lists])
    offsets = offsets_of(lengths)
    is_special = np.isin(tokens, tokenizer.all_special_ids)
    is_special[: len(specials)] = False
    if is_special.any():
        number = int(np.searchsorted(offsets, is_special.argmax(), side="right")) - 1
        raise ValueError(
            f"the word {texts[number - len(specials)]!r} contains a special token: rename that id "
            "or prepare with --numbering random"
        )
    return WordTable(tokens, offsets, num_masks, len(item_codes), len(user_codes))


def trim(words: WordTable, pad_token: int, vocabulary: Vocabulary | None = None) -> WordTable:
    """The same words in the numbers of a trimmed vocabulary.

    Args:
        words: in ids of the tokenizer.
        pad_token: the tokenizer's.
        vocabulary: None: that of exactly these words and `<pad>`.

    Raises:
        ValueError: a word has a token that the given vocabulary lacks.
    """
    assert words.vocabulary is None
    if vocabulary is None:
        eos = words.tokens[words.offsets[EOS_WORD] : words.offsets[EOS_WORD + 1]]
        outputs = np.union1d(words.tokens_of_items()[0], eos)
        read = np.setdiff1d(np.append(words.tokens, pad_token), outputs)
        vocabulary = Vocabulary(np.concatenate([outputs, read]).astype(np.int64), len(outputs))
    return dataclasses.replace(
        words, tokens=vocabulary.numbers(words.tokens), vocabulary=vocabulary
    )


class ItemTexts:
    """Reads generated token strings as items: by their whole text, which has to be an item's
    word."""

    def __init__(
        self,
        tokenizer: WordTokenizer,
        item_codes: Sequence[str],
        vocabulary: Vocabulary | None = None,
    ):
        """`vocabulary`: the trimmed one whose numbers are generated."""
        self.tokenizer, self.item_codes, self.vocabulary = tokenizer, item_codes, vocabulary

    @cached_property
    def row_of(self) -> dict[str, int]:
        # Some tokenizers, such as T5's, decode a word without its leading space.
        encoded = self.tokenizer.backend_tokenizer.encode(item_text("0"), add_special_tokens=False)
        decoded = self.tokenizer.backend_tokenizer.decode(encoded.ids, skip_special_tokens=False)
        first = 0 if decoded.startswith(" ") else 1
        return {item_text(code)[first:]: row for row, code in enumerate(self.item_codes)}

    def rows(self, token_lists: Sequence[Sequence[int]]) -> np.ndarray:
        """int32 [n], the item whose word these tokens spell, however they split it; -2 where there
        is none."""
        if self.vocabulary is not None:
            token_lists = [
                self.vocabulary.tokens[np.asarray(numbers, np.int64)].tolist()
                for numbers in token_lists
            ]
        texts = self.tokenizer.backend_tokenizer.decode_batch(
            [list(tokens) for tokens in token_lists], skip_special_tokens=False
        )
        return np.fromiter((self.row_of.get(text, -2) for text in texts), np.int32, len(texts))
