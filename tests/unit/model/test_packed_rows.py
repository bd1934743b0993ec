"""Padded rows as packed tokens and back."""

from __future__ import annotations

import torch

from genrec_dist.model.causal.packed_rows import PackedRows, num_shared


def test_shared_tokens_are_packed_once_and_unpacked_everywhere() -> None:
    tokens_BL = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 0]])
    real_BL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    assert num_shared(tokens_BL, real_BL) == 2
    rows = PackedRows.of(real_BL, 2)
    assert rows.pack(tokens_BL).tolist() == [5, 6, 7, 8, 9, 7]
    again_BL = rows.unpack(rows.pack(tokens_BL))
    assert torch.equal(again_BL[real_BL], tokens_BL[real_BL])
    assert len(PackedRows.of(real_BL).places_n) == 10


def test_a_row_that_ends_shares_no_more() -> None:
    tokens_BL = torch.tensor([[5, 6, 7], [5, 0, 0], [5, 6, 7]])
    assert num_shared(tokens_BL, torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()) == 1
    assert num_shared(tokens_BL[:1], torch.ones(1, 3).bool()) == 3
