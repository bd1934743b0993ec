"""The form of the encoder's input: what a position is, what fits, what comes before and after."""

# B samples, L input tokens, n tokens of all sequences, W words, S sub-words after the first

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from genrec_dist.config.recipe import EncoderUnit
from genrec_dist.data.word_table import HEAD_WORD, SEPARATOR_WORD, TAIL_WORD, WordTable


@dataclass(frozen=True)
class ForcedTokens:
    """Tokens of the items' words that are the only continuation in the trie
    (`trie.forced_tokens`)."""

    tokens: np.ndarray
    """bool [total], as `WordTable.tokens`."""
    ends: np.ndarray
    """bool [W], whether only </s> can follow a word."""


@dataclass(frozen=True)
class Layout:
    """The form of the encoder's input; the same for training, evaluation and single requests.
    Raises ValueError where `max_tokens` has no room for the longest user and item."""

    words: WordTable
    pad_token: int
    max_tokens: int
    """Most encoder positions."""
    user_ids: bool
    positions: Literal["from-start", "from-end"]
    unit: EncoderUnit = "subword"
    causal: bool = False
    """No [MASK] and no </s> after a history."""
    forced: ForcedTokens | None = None
    """Tokens of targets that are not learned; None: all are."""
    nodes: np.ndarray | None = None
    """int64 [total], as `WordTable.tokens`: the node of the trie that an item's token leads to; for
    a softmax over siblings."""

    def __post_init__(self) -> None:
        if self.sure_items < 1:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the longest user and item, "
                f"{self._longest_user} and {self.longest_item} positions, between <s> and </s>: "
                "raise it, train a larger vocabulary or let an item be one position "
                "(model.encoder_unit)"
            )

    @cached_property
    def item_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [N, T] the nodes of each item's tokens, -1 after its last one; bool [N, T], which
        are learned), for a softmax over siblings."""
        assert self.nodes is not None
        assert self.forced is not None
        words = self.words
        items = slice(words.first_item_word, words.first_user_word)
        lengths_N, total = words.lengths[items], slice(*words.offsets[[items.start, items.stop]])
        has_NT = np.arange(words.longest_item) < lengths_N[:, None]
        nodes_NT, learned_NT = np.full(has_NT.shape, -1), np.zeros(has_NT.shape, bool)
        nodes_NT[has_NT], learned_NT[has_NT] = self.nodes[total], ~self.forced.tokens[total]
        return nodes_NT, learned_NT

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [W], encoder positions of each word."""
        return self.words.lengths if self.unit == "subword" else np.ones_like(self.words.lengths)

    @property
    def written_lengths(self) -> np.ndarray:
        """int64 [W], the same without what comes between two words."""
        return self.lengths

    @property
    def head_length(self) -> int:
        """Positions before the user and the items: `<s>`."""
        return 1

    @property
    def max_items(self) -> int:
        """Most items of a history that are read, as far as they fit."""
        return self.max_tokens

    @property
    def lead(self) -> np.ndarray:
        """int64, what a decoder row has before the input whose output is its first label."""
        return np.empty(0, np.int64)

    @property
    def row_length(self) -> int:
        """Tokens of a decoder row that count where micro-batches are cut."""
        return 0

    @property
    def num_further(self) -> int:
        """S, most sub-words after the first that a position has."""
        if self.unit == "subword":
            return 0
        return max(self.words.longest_item, self.words.longest_user if self.user_ids else 0) - 1

    @property
    def sure_items(self) -> int:
        """Number of items that fit whatever their lengths; pretraining targets are drawn among
        these most recent ones."""
        return (self.max_tokens - 2 - self._longest_user) // self.longest_item

    @property
    def longest_item(self) -> int:
        """Encoder positions of the item's word that takes most."""
        return self.words.longest_item if self.unit == "subword" else 1

    @property
    def _longest_user(self) -> int:
        if not self.user_ids:
            return 0
        return self.words.longest_user if self.unit == "subword" else 1


@dataclass(frozen=True)
class PromptLayout(Layout):
    """The form of a prompt (`data/prompt/`): its head, and titles with separators between
    them, are what an encoder reads; its tail and the answer are a decoder row.

    So an item has room for its title and one separator, and the head for one separator less: a
    history of two titles has head + title + separator + title. Raises ValueError where `max_tokens`
    has no room for the head and the longest title.
    """

    max_titles: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < self.head_length + self.longest_item:
            raise ValueError(
                f"model.max_tokens {self.max_tokens}: too few for the prompt's {self.head} tokens "
                f"before the history and the longest title's {self.words.longest_item}: raise it"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        lengths = self.words.lengths.copy()
        lengths[self.words.first_item_word :] += self.separator
        return lengths

    @property
    def written_lengths(self) -> np.ndarray:
        return self.words.lengths

    @property
    def head(self) -> int:
        """Tokens before the first title."""
        return int(self.words.lengths[HEAD_WORD])

    @property
    def separator(self) -> int:
        """Tokens between two titles."""
        return int(self.words.lengths[SEPARATOR_WORD])

    @property
    def head_length(self) -> int:
        return self.head - self.separator

    @property
    def max_items(self) -> int:
        return self.max_titles

    @property
    def longest_item(self) -> int:
        return self.words.longest_item + self.separator

    @cached_property
    def tail(self) -> np.ndarray:
        """int64, the tokens after the history."""
        first, last = self.words.offsets[TAIL_WORD : TAIL_WORD + 2]
        return self.words.tokens[first:last].astype(np.int64)

    @property
    def lead(self) -> np.ndarray:
        return self.tail[:-1]

    @property
    def row_length(self) -> int:
        # With a mean title: a target's own length would choose what its sample is cut beside.
        return len(self.tail) + len(self.words.tokens_of_items()[0]) // self.words.num_items + 1
