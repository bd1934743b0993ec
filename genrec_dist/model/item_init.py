"""Rows of items that begin beside their neighbours."""

# N items, F factors, V rows of a table, D its width

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_FACTORS = 128
"""Columns of an item's row that co-occurrence can begin; more say little and take long to find."""


@torch.no_grad()
def turn_rows(table_VD: Tensor, rows_N: Tensor, vectors_NF: np.ndarray, init_std: float) -> None:
    """Turn these rows of a table towards the vectors, each as long as a random row of standard
    deviation `init_std` is.

    Items with a vector of zeros and columns behind F keep what they have.
    """
    turned_NF = torch.from_numpy(vectors_NF)[:, : table_VD.shape[1]]
    known_N = turned_NF.norm(dim=1) > 0
    # The mean is what all items share: it tells none from another.
    turned_NF = turned_NF[known_N] - turned_NF[known_N].mean(0)
    turned_NF = turned_NF / turned_NF.norm(dim=1, keepdim=True).clamp(min=1e-12)
    length = init_std * turned_NF.shape[1] ** 0.5
    table_VD[rows_N[known_N], : turned_NF.shape[1]] = (length * turned_NF).to(table_VD.dtype)
