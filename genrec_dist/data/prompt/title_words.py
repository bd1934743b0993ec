"""The words of a prompt: the items' titles, the text around them, and the end of an answer, as
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import offsets_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genrec_dist.config.validate import HISTORY
from genrec_dist.data.layout import ForcedTokens, PromptLayout
from genrec_dist.data.tokenizer import SPECIAL_TOKENS
from genrec_dist.data.word_table import ItemTexts, WordTable

UNTITLED = "untitled"


def titles_of(dataset: Dataset) -> list[str]:
    """The titles of a data directory, by item row, no two equal. Raises ValueError where it has no
    titles."""
    described = dataset.descriptions
    if described is None or described.titles is None:
        info = dataset.info
        raise ValueError(
            f"{dataset.path}: its items have no titles, which a prompt is made of: make it once "
            f"more with `genrec prepare {dataset.path} --out NEW --items META "
            f"--numbering {info.numbering} --seed {info.seed}`, whose META has a column title"
        )
    return distinct_titles(described.titles)


def distinct_titles(titles: Sequence[str]) -> list[str]:
    """The titles on one line each; of equal ones the second is "title (2)", and so on, by row.

    Rows follow the sorted ids, so that the numbers depend on the catalogue alone.
    """
    lines = [" ".join(title.split()) or UNTITLED for title in titles]
    taken, found = set(lines), list[str]()
    seen: dict[str, int] = {}
    for line in lines:
        number = seen.get(line, 0) + 1
        title = line
        if number > 1:
            # A film may be called "Title (2)" by itself.
            while (title := f"{line} ({number})") in taken:
                number += 1
        seen[line] = number
        taken.add(title)
        found.append(title)
    return found


def train_title_tokenizer(
    titles: Sequence[str], template: str, vocab_size: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on each title once and on the template, so that it depends on the
    catalogue alone. Raises ValueError where `vocab_size` has no room for bytes and special
    tokens."""
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"tokens.vocab_size {vocab_size}: at least {smallest} are needed for bytes and special "
            "tokens"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([template.replace(HISTORY, ""), *titles], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def build_title_words(
    tokenizer: PreTrainedTokenizerFast, titles: Sequence[str], template: str, separator: str
) -> WordTable:
    """The word table of a prompt. Each title is encoded alone, so that it has the same tokens in a
    history and as an answer.

    Args:
        tokenizer: fast; its own first token, where it puts one, is before the template.
        titles: by item row, no two equal.
        template: text with {history} in it.
        separator: of two titles.

    Raises:
        ValueError: a title contains the separator or a special token, or has no tokens.
    """
    for row, title in enumerate(titles):
        if separator in title:
            raise ValueError(
                f"prompt.separator {separator!r} is in the title {title!r} (item row {row}): set "
                "one that no title contains, such as a line's end"
            )
    backend = tokenizer.backend_tokenizer

    def encode(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    plain, framed = encode("a"), backend.encode("a", add_special_tokens=True).ids
    first = framed[: framed.index(plain[0])]
    head, _, tail = template.partition(HISTORY)
    texts = [
        [*first, *encode(head)],
        [int(tokenizer.eos_token_id)],
        encode(tail),
        encode(separator),
    ]
    encoded = backend.encode_batch(list(titles), add_special_tokens=False)
    title_ids = [encoding.ids for encoding in encoded]
    special = set(tokenizer.all_special_ids)
    for title, ids in zip(titles, title_ids, strict=True):
        if not ids or special.intersection(ids):
            problem = "contains a special token" if ids else "has no token"
            raise ValueError(f"the title {title!r} {problem}: change it in the table of --items")
    lists = [*texts, *title_ids]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in lists])
    offsets = offsets_of(np.array([len(ids) for ids in lists]))
    return WordTable(tokens, offsets, num_masks=2, num_items=len(titles), num_users=0)


def make_prompt_layout(
    words: WordTable,
    pad_token: int,
    max_tokens: int,
    max_titles: int,
    forced: ForcedTokens | None = None,
) -> PromptLayout:
    """The form of prompts of these words. Raises ValueError where `max_tokens` has no room for the
    head and the longest title."""
    return PromptLayout(
        words=words,
        pad_token=pad_token,
        max_tokens=max_tokens,
        user_ids=False,
        positions="from-start",
        causal=True,
        forced=forced,
        max_titles=max_titles,
    )


class TitleTexts(ItemTexts):
    """Reads generated token strings as items by their titles."""

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {title: row for row, title in enumerate(self.item_codes)}
