"""The fused operations in plain torch: specification, CPU path and fallback."""

# B users, L input tokens, D width

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def embedding_sum(
    token_ids_BL: Tensor,
    position_ids_BL: Tensor,
    user_rows_BL: Tensor,
    item_rows_BL: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    user_table: Tensor | None,
    item_table: Tensor | None,
    *,
    scale: float = 1.0,
    id_dropout: float = 0.0,
    training: bool = False,
    pad_token_id: int | None = None,
    user_projection: Tensor | None = None,
    item_projection: Tensor | None = None,
) -> Tensor:
    """X = EMB(S) * scale + PosEMB + UIDEMB + TIDEMB, float [B, L, D] (GenRec, equation 2).

    All indices are integer [B, L]; tables are [rows, D]; a table that is None adds nothing. Row 0 of the id tables is the
    zero row and never learns. An id table may be factorised: [rows, F] with a projection [D, F]. `id_dropout` drops entries
    of the id terms alone. Indices must be in range: the caller checks them where batches are made.
    """
    embedded = F.embedding(token_ids_BL, token_table, padding_idx=pad_token_id)
    if scale != 1.0:
        embedded = embedded * scale
    embedded = embedded + F.embedding(position_ids_BL, position_table)
    for rows_BL, table, projection in (
        (user_rows_BL, user_table, user_projection),
        (item_rows_BL, item_table, item_projection),
    ):
        if table is not None:
            ids_BLD = F.embedding(rows_BL, table, padding_idx=0)
            if projection is not None:
                ids_BLD = F.linear(ids_BLD, projection)
            embedded = embedded + F.dropout(ids_BLD, id_dropout, training)
    return embedded
