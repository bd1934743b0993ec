"""Rows of items initialised with directions that they share with their neighbours."""

# N items, F factors, V rows of a table, D its width

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec_dist.data.word_table import WordTable
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.network import IdEmbedding

MOST_FACTORS = 128
"""Most columns of an item's row that co-occurrence initialises; more carry little and take long to
find."""


def init_item_rows(
    network: GenRecForConditionalGeneration, vectors_NF: np.ndarray, words: WordTable
) -> None:
    """Turn the rows of the items' tokens towards the vectors where each item is one token, else the
    rows of the item id table.

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
    else:
        raise ValueError(
            "model.init_items: items have several tokens and no id: set model.item_ids true or "
            "raise tokens.vocab_size"
        )
    turn_rows(table, rows_N, vectors_NF, network.config.init_std)


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
