"""Distributions over the next item that training learns beside its targets."""

# U users, S prefixes of training parts, n rows in a loss, K items of a distribution

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.data.batch import SoftTargets
from genrec_dist.data.word_table import WordTable


@dataclass(frozen=True, eq=False)
class Teacher:
    """The likeliest next items after each prefix of each training part."""

    first_U: np.ndarray
    """int64 [U], index of the user's first prefix, the one of one item; the next ones follow."""
    items_SK: np.ndarray
    """int32, item rows."""
    shares_SK: np.ndarray
    """float32, their parts of the target's probability; what is left is the true target's."""

    def soft_targets(
        self, user_rows_n: np.ndarray, places_n: np.ndarray, words: WordTable
    ) -> SoftTargets:
        """Of items at these places, 1 or above, of the users' training parts; an item is one
        token."""
        soft = self.of_items(user_rows_n, places_n)
        words_nK = words.item_words(soft.tokens_nK.numpy())
        tokens_nK = words.tokens[words.offsets[words_nK]].astype(np.int64)
        return SoftTargets(torch.from_numpy(tokens_nK), soft.shares_nK)

    def of_items(self, user_rows_n: np.ndarray, places_n: np.ndarray) -> SoftTargets:
        """The same where an item's token is its row."""
        rows_n = self.first_U[user_rows_n] + places_n - 1
        items_nK = torch.from_numpy(self.items_SK[rows_n].astype(np.int64))
        return SoftTargets(items_nK, torch.from_numpy(self.shares_SK[rows_n]))
