"""Words and their sub-words: tokenizer, and the table `word -> token ids` that batches gather
from."""

# W words, N items, U users

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genrec_dist.data.word_table import item_text, user_text

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(
    item_codes: Sequence[str], vocab_size: int, num_masks: int = 1
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over each item's word once; what it learns depends on the catalogue's codes
    alone.

    A word is cut before BPE sees it only where `-` begins another level of a hierarchical code, so
    with a large enough vocabulary an item is one token a level: ` item_a12`, `-b45`, `-c7`."""
    specials = SPECIAL_TOKENS + [f"<mask_{j}>" for j in range(1, num_masks)]
    smallest = len(specials) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"tokens.vocab_size {vocab_size}: at least {smallest} are needed for bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^ -]+|-[^ -]*"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words_to_learn(item_codes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=specials[len(SPECIAL_TOKENS) :],
    )


def _words_to_learn(item_codes: Sequence[str]) -> Iterator[str]:
    # A user's digits are spelled with the pieces of item codes; only the stem is new, as frequent
    # as the items'.
    for code in item_codes:
        yield item_text(code)
        yield user_text("")


def load_tokenizer(name: str | Path, num_masks: int = 1) -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer by name or directory, with the numbered masks it lacks.

    Raises ValueError naming it and the ways out if it cannot be loaded or does not fit.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), use_fast=True)
    except (OSError, ValueError):
        raise ValueError(
            f"tokens.tokenizer {name}: neither a directory with a tokenizer nor reachable on the hub; "
            "download it beforehand and give its directory, or set tokens.tokenizer to null to train one"
        ) from None
    _check_tokenizer(tokenizer, name)
    # Some tokenizers are saved with these on; a word must come out as it is.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    known = tokenizer.get_vocab()
    missing = [f"<mask_{j}>" for j in range(1, num_masks) if f"<mask_{j}>" not in known]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": missing}, replace_extra_special_tokens=False
    )
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str | Path) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokens.tokenizer {name}: not a fast tokenizer")
    for role in ("bos_token", "pad_token", "eos_token", "mask_token"):
        if getattr(tokenizer, role) is None:
            raise ValueError(f"tokens.tokenizer {name}: it has no {role}")
    # Hugging Face makes an empty tokenizer of a directory that holds a model and no vocabulary.
    if not tokenizer.backend_tokenizer.encode(item_text("0"), add_special_tokens=False).ids:
        raise ValueError(
            f"tokens.tokenizer {name}: no vocabulary in it; save the tokenizer beside the model"
        )


def grow_tokenizer(
    tokenizer: PreTrainedTokenizerFast, known_codes: Sequence[str], new_codes: Sequence[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer that also speaks new items as it speaks the known ones: known words keep their
    tokens.

    Where each part of every known item's word (a level of a code, or all of it) is one token of a
    byte-level BPE, each part of the new ones becomes one, too, with the next free ids. Elsewhere
    new words are spelled with the sub-words there are, and it is the same tokenizer that comes
    back. Raises ValueError where a known word would be cut otherwise."""
    backend = tokenizer.backend_tokenizer
    if not new_codes or not all(_is_whole(backend, item_text(code)) for code in known_codes):
        return tokenizer
    facts = json.loads(backend.to_str())
    if facts["model"]["type"] != "BPE":
        return tokenizer
    vocabulary = facts["model"]["vocab"]
    following = max(tokenizer.get_vocab().values()) + 1
    for code in new_codes:
        for part, _ in backend.pre_tokenizer.pre_tokenize_str(item_text(code)):
            if part not in vocabulary:
                vocabulary[part] = following
                following += 1
    # A part that stands in the vocabulary is one token, without merges that would have to lead
    # there.
    facts["model"]["ignore_merges"] = True
    roles = tokenizer.special_tokens_map
    grown = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)),
        additional_special_tokens=[
            token for token in tokenizer.all_special_tokens if token not in roles.values()
        ],
        **roles,
    )
    known = [item_text(code) for code in known_codes]
    for before, after in zip(_ids(tokenizer, known), _ids(grown, known), strict=True):
        if before != after:
            raise ValueError(
                f"the tokenizer cannot take {len(new_codes):,} new items without cutting the word "
                f"{tokenizer.decode(before)!r} anew: train without init_from"
            )
    return grown


def _is_whole(backend: Tokenizer, word: str) -> bool:
    """Is each part that is cut before BPE one token?"""
    return len(backend.encode(word, add_special_tokens=False).ids) == len(
        backend.pre_tokenizer.pre_tokenize_str(word)
    )


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer.backend_tokenizer.encode_batch(list(words), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def count_masks(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many numbered masks a saved tokenizer holds, `<mask>` included."""
    vocabulary = tokenizer.get_vocab()
    count = 1
    while f"<mask_{count}>" in vocabulary:
        count += 1
    return count
