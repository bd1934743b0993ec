"""The tokenizer: trained on a catalogue's words, loaded, or grown by the words of new items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genrec_dist.data.word_table import item_text, user_text

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Role -> token, in the order of their ids."""


def train_tokenizer(
    item_codes: Sequence[str], vocab_size: int, num_masks: int = 1
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on each item's word once, so that it depends on the catalogue's
    codes alone.

    A word is split before BPE only where `-` begins another level of a hierarchical code. With a
    large enough vocabulary an item is then one token per level: ` item_a12`, `-b45`, `-c7`.

    Raises:
        ValueError: `vocab_size` has no room for bytes and special tokens.
    """
    masks = [f"<mask_{j}>" for j in range(1, num_masks)]
    specials = [*SPECIAL_TOKENS.values(), *masks]
    smallest = len(specials) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"tokens.vocab_size {vocab_size}: at least {smallest} are needed for bytes and special "
            "tokens"
        )
    by_level = pre_tokenizers.Split(Regex(r" ?[^ -]+|-[^ -]*"), behavior="isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_level, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A user's digits are spelled with the sub-words of item codes. Only the stem of users' words is
    # new; it is as frequent as the items'.
    words = (word for code in item_codes for word in (item_text(code), user_text("")))
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=masks, **SPECIAL_TOKENS
    )


T5_MASK = "<extra_id_0>"

ROLES = ("bos_token", "pad_token", "eos_token", "mask_token")
"""Roles of tokens that an encoder-decoder needs."""


def load_tokenizer(
    name: str | Path,
    num_masks: int = 1,
    key: str = "tokens.tokenizer",
    roles: Sequence[str] = ROLES,
) -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer by name or directory, with the numbered masks it lacks.

    Args:
        name: of the tokenizer, or its directory.
        num_masks: how many masks it is to have, where it has any.
        key: of the recipe that says the name.
        roles: for which it has to have a token.

    Raises:
        ValueError: it cannot be loaded or does not fit; names it and the ways out.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), use_fast=True)
    except (OSError, ValueError):
        raise ValueError(
            f"{key} {name}: neither a directory with a tokenizer nor reachable on the hub; "
            f"download it beforehand and give its directory, or set {key} to null to train one"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokens.tokenizer {name}: not a fast tokenizer")
    if tokenizer.mask_token is None and T5_MASK in tokenizer.get_vocab():
        # T5 has learned to fill this one, and has no token for a text's start.
        tokenizer.add_special_tokens({"mask_token": T5_MASK, "bos_token": "<s>"})
    for role in roles:
        if getattr(tokenizer, role) is None:
            raise ValueError(f"tokens.tokenizer {name}: it has no {role}")
    # Hugging Face makes an empty tokenizer of a directory that holds a model and no vocabulary.
    if not tokenizer.backend_tokenizer.encode(item_text("0"), add_special_tokens=False).ids:
        raise ValueError(
            f"tokens.tokenizer {name}: no vocabulary in it; save the tokenizer beside the model"
        )
    # Some tokenizers are saved with these on; words have to be encoded whole.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    known = tokenizer.get_vocab()
    missing = [f"<mask_{j}>" for j in range(1, num_masks) if f"<mask_{j}>" not in known]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": missing}, replace_extra_special_tokens=False
    )
    return tokenizer


def grow_tokenizer(
    tokenizer: PreTrainedTokenizerFast, known_codes: Sequence[str], new_codes: Sequence[str]
) -> PreTrainedTokenizerFast:
    """The tokenizer that encodes new items as it encodes the known ones, whose tokens it keeps.

    Where each level of every known item's word is one token of a byte-level BPE, each level of the
    new ones becomes one, too, with the next free ids. Elsewhere new words are spelled with the
    sub-words there are, and the same tokenizer is returned.

    Raises:
        ValueError: a known word would be split otherwise.
    """
    if not new_codes:
        return tokenizer
    backend = tokenizer.backend_tokenizer

    def levels_of(code: str) -> list[str]:
        return [level for level, _ in backend.pre_tokenizer.pre_tokenize_str(item_text(code))]

    known = [item_text(code) for code in known_codes]
    before = _ids(tokenizer, known)
    whole = all(
        len(ids) == len(levels_of(code)) for ids, code in zip(before, known_codes, strict=True)
    )
    state = json.loads(backend.to_str())
    if not whole or state["model"]["type"] != "BPE":
        return tokenizer
    vocabulary = state["model"]["vocab"]
    next_id = max(tokenizer.get_vocab().values()) + 1
    for code in new_codes:
        for level in levels_of(code):
            if level not in vocabulary:
                vocabulary[level] = next_id
                next_id += 1
    # A level in the vocabulary is one token, without merges that would have to lead to it.
    state["model"]["ignore_merges"] = True
    roles = tokenizer.special_tokens_map
    others = [token for token in tokenizer.all_special_tokens if token not in roles.values()]
    grown = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        additional_special_tokens=others,
        **roles,
    )
    for ids, after in zip(before, _ids(grown, known), strict=True):
        if ids != after:
            raise ValueError(
                f"the tokenizer cannot take {len(new_codes):,} new items without cutting the word "
                f"{tokenizer.decode(ids)!r} anew: train without init_from"
            )
    return grown


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer.backend_tokenizer.encode_batch(list(words), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]
