"""Distributions over the next item that training learns beside its targets."""

# U users, S prefixes of training parts, n rows in a loss, m their tokens, K items of a
# distribution, C those and the true one, N items of the catalogue, T tokens of an item

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from genrec_shards.keyed_random import keyed_uniform

from genrec_dist.data.batch import SoftTargets
from genrec_dist.data.layout import Layout
from genrec_dist.data.word_table import WordTable

_DRAW_STREAM = 0x50F7


@dataclass(frozen=True, eq=False)
class Teacher:
    """The likeliest next items after each prefix of each training part."""

    first_U: np.ndarray
    """int64 [U], index of the user's first prefix, the one of one item; the next ones follow."""
    items_SK: np.ndarray
    """int32, item rows."""
    shares_SK: np.ndarray
    """float32, their parts of the target's probability; what is left is the true target's."""

    def prefixes(self, user_rows_n: np.ndarray, places_n: np.ndarray) -> np.ndarray:
        """int64 [n], the prefixes before items at these places, 1 or above, of the users' training
        parts."""
        return self.first_U[user_rows_n] + places_n - 1

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
        rows_n = self.prefixes(user_rows_n, places_n)
        items_nK = torch.from_numpy(self.items_SK[rows_n].astype(np.int64))
        return SoftTargets(items_nK, torch.from_numpy(self.shares_SK[rows_n]))

    def draw_items(
        self, prefixes_n: np.ndarray, items_n: np.ndarray, seed: int, epoch: int
    ) -> np.ndarray:
        """int32 [n]: an item after each prefix, drawn from its whole distribution, true targets
        `items_n` included.

        What an item of several tokens is taught after its first one depends on it: on average over
        the draws the loss is that of the distribution over items."""
        below_nK = self.shares_SK[prefixes_n].cumsum(1)
        uniform_n = keyed_uniform(seed, epoch, prefixes_n, _DRAW_STREAM)
        place_n = (uniform_n[:, None] >= below_nK).sum(1)
        is_soft_n = place_n < below_nK.shape[1]
        soft_n = self.items_SK[prefixes_n, np.where(is_soft_n, place_n, 0)]
        return np.where(is_soft_n, soft_n, items_n).astype(items_n.dtype)

    def soft_siblings(
        self, prefixes_n: np.ndarray, items_n: np.ndarray, drawn_n: np.ndarray, layout: Layout
    ) -> SoftTargets:
        """Of each learned token of the drawn items, one item's after another's: the shares of its
        siblings, given the tokens before it.

        Args:
            prefixes_n: of `prefixes`.
            items_n: int32, the true targets.
            drawn_n: int32, of `draw_items`.
            layout: of a softmax over siblings.
        """
        # An item 1 of the nodes 1 4 is drawn; items 1, 2 (1 5) and 3 (2 6) have .6, .2 and .2:
        #   first token: nodes 1 1 2 with .6 .2 .2; second token, after node 1: nodes 4 5 - with
        #   .75 .25 0, where the item outside is given the drawn item's node and nothing.
        nodes_NT, learned_NT = layout.item_nodes
        shares_nK = self.shares_SK[prefixes_n]
        rest_n1 = np.maximum(1 - shares_nK.sum(1, keepdims=True), 0)
        shares_nC = np.concatenate([shares_nK, rest_n1], 1)
        items_nC = np.concatenate([self.items_SK[prefixes_n], items_n[:, None]], 1)
        nodes_nCT, drawn_nT = nodes_NT[items_nC], nodes_NT[drawn_n]
        same_nC = np.ones(shares_nC.shape, bool)
        nodes_nTC, shares_nTC = [], []
        for level in range(nodes_NT.shape[1]):
            beside_nC = np.where(same_nC, nodes_nCT[:, :, level], drawn_nT[:, level, None])
            part_nC = shares_nC * same_nC
            total_n1 = part_nC.sum(1, keepdims=True)
            nodes_nTC.append(beside_nC)
            shares_nTC.append(part_nC / np.maximum(total_n1, 1e-12))
            same_nC = same_nC & (nodes_nCT[:, :, level] == drawn_nT[:, level, None])
        learned_nT = learned_NT[drawn_n]
        nodes_mC = np.stack(nodes_nTC, 1)[learned_nT]
        shares_mC = np.stack(shares_nTC, 1)[learned_nT].astype(np.float32)
        return SoftTargets(torch.from_numpy(nodes_mC), torch.from_numpy(shares_mC))
