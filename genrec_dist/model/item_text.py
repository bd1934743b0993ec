"""Vectors of the items' texts, projected into the rows of the items' tokens."""

# N items, F dims of a text's vector, V rows of the token table, D its width

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genrec_dist.data.word_table import WordTable

RIDGE = 1.0
"""Penalty of the projection that is fitted to rows which hold something, for text vectors of length
1."""


class ItemText(nn.Module):
    """What the items' texts add to the rows of their tokens, by a projection that is learned.

    An item that training never shows could only sink in the softmax. It has no row of its own, and
    none at all while training; in the end its row is what its text says."""

    rows_N: Tensor
    """int64 [N], each item's row of the token table."""
    vectors_NF: Tensor
    """float32, of length 1, or 0 without a text."""
    own_V1: Tensor
    """float32, 0 for a row that texts alone make, else 1."""

    def __init__(self, num_items: int, dims: int, num_rows: int, width: int):
        """Without values."""
        super().__init__()
        self.projection_FD = nn.Parameter(torch.empty(dims, width))
        # Not in the weights: they follow from the data, and `best` has what they come to.
        buffers = {
            "rows_N": torch.zeros(num_items, dtype=torch.int64),
            "vectors_NF": torch.zeros(num_items, dims),
            "own_V1": torch.ones(num_rows, 1),
        }
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, table_VD: Tensor) -> Tensor:
        """The token table with the texts in the items' rows, in float32, for training."""
        return self._sum(table_VD) * self.own_V1

    def whole(self, table_VD: Tensor) -> Tensor:
        """The same for decoding: with the rows of items that training never shows."""
        return self._sum(table_VD * self.own_V1)

    def _sum(self, table_VD: Tensor) -> Tensor:
        with torch.autocast(table_VD.device.type, enabled=False):
            text_ND = self.vectors_NF @ self.projection_FD
            return table_VD.index_add(0, self.rows_N, text_ND)

    def like(self) -> ItemText:
        """A module of the same form, without values, on torch's default device."""
        (num_items, dims), width = self.vectors_NF.shape, self.projection_FD.shape[1]
        return ItemText(num_items, dims, len(self.own_V1), width)


def item_rows(words: WordTable) -> Tensor:
    """int64 [N], the row of each item's token.

    Raises:
        ValueError: an item has several tokens.
    """
    tokens, offsets = words.tokens_of_items()
    if (np.diff(offsets) != 1).any():
        raise ValueError(
            "model.item_text: items have several tokens, so that no row is an item's: raise "
            "tokens.vocab_size, or set item_text none"
        )
    return torch.from_numpy(tokens.astype(np.int64))


@torch.no_grad()
def add_texts(
    model: Any,
    vectors_NF: np.ndarray,
    words: WordTable,
    trained_N: np.ndarray,
    known_N: np.ndarray | None = None,
) -> None:
    """Give a model the module that adds texts to its items' rows.

    Args:
        model: changed in place; its items' rows have their initial values.
        vectors_NF: float32, of `item_vectors`.
        words: which tokens the items have.
        trained_N: bool, items that the training parts hold.
        known_N: bool, items whose initial rows say something. The projection then begins as the one
            that tells these rows best from the texts (least squares with a penalty), so that a text
            points where the items of like texts are. None: it begins at random.

    Raises:
        ValueError: an item has several tokens.
    """
    table_VD, rows_N = model.model.shared.weight, item_rows(words)
    text = ItemText(*vectors_NF.shape, *table_VD.shape)
    text.rows_N.copy_(rows_N)
    text.vectors_NF.copy_(torch.from_numpy(vectors_NF))
    if known_N is None:
        nn.init.normal_(text.projection_FD, std=model.config.init_std)
    else:
        known = torch.from_numpy(known_N)
        text_nF, rows_nD = text.vectors_NF[known].double(), table_VD[rows_N[known]].double()
        penalty_FF = RIDGE * torch.eye(text_nF.shape[1], dtype=torch.float64)
        found_FD = torch.linalg.solve(text_nF.T @ text_nF + penalty_FF, text_nF.T @ rows_nD)
        text.projection_FD.copy_(found_FD)
    # Without a text an item keeps its own row: it would have none at all.
    alone_N = text.vectors_NF.any(1) & ~torch.from_numpy(trained_N)
    text.own_V1[rows_N[alone_N]] = 0
    model.item_text = text


@contextlib.contextmanager
def texts_added(model: Any) -> Iterator[None]:
    """Context in which embeddings and head compute with the texts in the items' rows; gradients
    reach the model's own table and the projection."""
    if model.item_text is None:
        yield
        return
    bart, rows_VD = model.model, model.item_text(model.model.shared.weight)
    tied = (bart.shared, bart.encoder.embed_tokens, bart.decoder.embed_tokens, model.lm_head)
    for module in tied:
        # Found before the parameter of the same name, which stays where it is.
        module.__dict__["weight"] = rows_VD
    try:
        yield
    finally:
        for module in tied:
            module.__dict__.pop("weight", None)


@contextlib.contextmanager
def texts_in_table(model: Any) -> Iterator[None]:
    """Context in which the texts are part of the model's own table, for decoding and for `best/`,
    which so need neither vectors nor projection."""
    if getattr(model, "item_text", None) is None:
        yield
        return
    text, table_VD = model.item_text, model.model.shared.weight
    kept_VD = table_VD.detach().clone()
    begin_with_texts(model)
    try:
        yield
    finally:
        with torch.no_grad():
            table_VD.copy_(kept_VD)
        model.item_text = text


@torch.no_grad()
def begin_with_texts(model: Any) -> None:
    """Add the texts to the model's own table, and leave the module out from now on."""
    table_VD = model.model.shared.weight
    table_VD.copy_(model.item_text.whole(table_VD))
    model.item_text = None
