"""Rows of items: what they begin with from their neighbours, and what their texts add."""

# N items, F factors or dims of a text's vector, V rows of a table, D its width

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from genrec_dist.data.word_table import WordTable
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.network import IdEmbedding, ItemText

MOST_FACTORS = 128
"""Most columns of an item's row that co-occurrence initialises; more carry little and take long to
find."""
RIDGE = 1.0
"""Penalty of the projection that is fitted to rows which hold something, for text vectors of length
1."""


def init_item_rows(
    network: GenRecForConditionalGeneration, vectors_NF: np.ndarray, words: WordTable
) -> None:
    """Turn the rows of the items' tokens towards the vectors where each item is one token, else the
    rows of the item id table and, for a softmax over siblings, those of the tokens of codes.

    Args:
        network: changed in place.
        vectors_NF: float [N, F], zeros for items without a neighbour.
        words: which tokens the items have.

    Raises:
        ValueError: several tokens make an item and there is no item id table.
    """
    tokens, offsets = words.tokens_of_items()
    if (np.diff(offsets) == 1).all():
        rows_N, table = torch.from_numpy(tokens.astype(np.int64)), network.model.shared.weight
    elif isinstance(network.item_embedding, IdEmbedding):
        rows_N, table = torch.arange(1, words.num_items + 1), network.item_embedding.weight
        if network.config.softmax == "siblings":
            _turn_token_rows(network, vectors_NF, tokens, offsets)
    else:
        raise ValueError(
            "model.init_items: items have several tokens and no id: set model.item_ids true or "
            "raise tokens.vocab_size"
        )
    turn_rows(table, rows_N, vectors_NF, network.config.init_std)


LEAST_COMMON = 0.25
"""Length of the mean of directions below which they have none in common."""


def _turn_token_rows(
    network: GenRecForConditionalGeneration,
    vectors_NF: np.ndarray,
    tokens: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Turn the row of each token of items towards the mean of what the tokens before it leave of
    its items' directions; where these have nothing in common it keeps its random row.

    Args:
        network: changed in place.
        vectors_NF: float [N, F], zeros for items without a neighbour.
        tokens: the items' tokens, one item's after another's.
        offsets: int64 [N + 1].
    """
    lengths_N1 = np.linalg.norm(vectors_NF, axis=1, keepdims=True)
    known_N = lengths_N1[:, 0] > 0
    left_NF = vectors_NF / np.maximum(lengths_N1, 1e-12)
    left_NF -= left_NF[known_N].mean(0)
    for level in range(int(np.diff(offsets).max())):
        items = np.flatnonzero(known_N & (np.diff(offsets) > level))
        tokens_V, token_n = np.unique(tokens[offsets[items] + level], return_inverse=True)
        mean_VF = np.zeros((len(tokens_V), left_NF.shape[1]))
        np.add.at(mean_VF, token_n, left_NF[items])
        mean_VF /= np.bincount(token_n)[:, None]
        mean_VF[np.linalg.norm(mean_VF, axis=1) < LEAST_COMMON] = 0
        left_NF[items] -= mean_VF[token_n]
        if mean_VF.any():
            rows_V = torch.from_numpy(tokens_V.astype(np.int64))
            turn_rows(network.model.shared.weight, rows_V, mean_VF, network.config.init_std)


@torch.no_grad()
def turn_rows(table_VD: Tensor, rows_N: Tensor, vectors_NF: np.ndarray, init_std: float) -> None:
    """Turn these rows of a table towards the vectors, each to the length of a random row with
    standard deviation `init_std`.

    Items with a vector of zeros, and columns from F on, keep their values.
    """
    turned_NF = torch.from_numpy(vectors_NF)[:, : table_VD.shape[1]]
    known_N = turned_NF.norm(dim=1) > 0
    # The mean is what all items share: it distinguishes none.
    turned_NF = turned_NF[known_N] - turned_NF[known_N].mean(0)
    turned_NF = turned_NF / turned_NF.norm(dim=1, keepdim=True).clamp(min=1e-12)
    length = init_std * turned_NF.shape[1] ** 0.5
    table_VD[rows_N[known_N], : turned_NF.shape[1]] = (length * turned_NF).to(table_VD.dtype)


def item_tokens(words: WordTable, key: str, off: str) -> Tensor:
    """int64 [N], each item's token; `key`: of the recipe, which needs there to be one, and its
    value that does not. Raises ValueError where an item has several tokens."""
    tokens, offsets = words.tokens_of_items()
    if (np.diff(offsets) != 1).any():
        raise ValueError(
            f"{key}: items have several tokens, so that no row is an item's: raise "
            f"tokens.vocab_size, or set {key} {off}"
        )
    return torch.from_numpy(tokens.astype(np.int64))


@torch.no_grad()
def add_texts(
    model: GenRecForConditionalGeneration,
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
        ValueError: an item has several tokens, or the model is a T5.
    """
    if not isinstance(model, GenRecForConditionalGeneration):
        raise ValueError("model.item_text: a T5's rows take no texts: set item_text none")
    table_VD, rows_N = model.model.shared.weight, item_tokens(words, "model.item_text", "none")
    model.item_text = item_text_of(
        table_VD, rows_N, vectors_NF, trained_N, known_N, model.config.init_std
    )


@torch.no_grad()
def item_text_of(
    table_VD: Tensor,
    rows_N: Tensor,
    vectors_NF: np.ndarray,
    trained_N: np.ndarray,
    known_N: np.ndarray | None,
    init_std: float,
) -> ItemText:
    """The module that adds texts to a table's rows; its arguments are those of `add_texts`, and
    `rows_N` (int64 [N]) are the items' rows of the table."""
    text = ItemText(len(rows_N), vectors_NF.shape[1], *table_VD.shape)
    text.rows_N.copy_(rows_N)
    text.vectors_NF.copy_(torch.from_numpy(vectors_NF))
    if known_N is None:
        nn.init.normal_(text.projection_FD, std=init_std)
    else:
        known = torch.from_numpy(known_N)
        text_nF, rows_nD = text.vectors_NF[known].double(), table_VD[rows_N[known]].double()
        penalty_FF = RIDGE * torch.eye(text_nF.shape[1], dtype=torch.float64)
        found_FD = torch.linalg.solve(text_nF.T @ text_nF + penalty_FF, text_nF.T @ rows_nD)
        text.projection_FD.copy_(found_FD)
    # Without a text an item keeps its own row: it would have none at all.
    alone_N = text.vectors_NF.any(1) & ~torch.from_numpy(trained_N)
    text.own_V1[rows_N[alone_N]] = 0
    return text


@contextlib.contextmanager
def texts_in_table(model: nn.Module) -> Iterator[None]:
    """Context in which the texts are part of the model's own table, for decoding and for `best/`,
    which so need neither vectors nor projection."""
    if getattr(model, "item_text", None) is None:
        yield
        return
    network = cast(GenRecForConditionalGeneration, model)
    text, table_VD = network.item_text, network.model.shared.weight
    kept_VD = table_VD.detach().clone()
    begin_with_texts(network)
    try:
        yield
    finally:
        with torch.no_grad():
            table_VD.copy_(kept_VD)
        network.item_text = text


@torch.no_grad()
def begin_with_texts(model: GenRecForConditionalGeneration) -> None:
    """Add the texts to the model's own table, and leave the module out from now on."""
    table_VD, text = model.model.shared.weight, model.item_text
    assert text is not None
    table_VD.copy_(text.whole(table_VD))
    model.item_text = None
