"""BSARec: SASRec's layers with a frequency filter beside the attention, one prefix per row."""

# B rows of a batch, L positions of a row, d width, H heads

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.baselines.sasrec.model import Block, Packed, SASRec, SasrecSettings
from genrec_dist.model.dropout import drop

NORM_EPSILON = 1e-12
"""The published code's; embeddings are so small at first that the usual 1e-5 would show."""
MASKED = -10_000.0
"""Added to what attention may not read. A padded place may read nothing, so it reads everything
evenly, as in the published code; the filter of the next layer sees it."""


@dataclass(frozen=True)
class BsarecSettings(SasrecSettings):
    """The published settings of Beauty; `norm` and `positions` are the paper's and have no
    effect."""

    d_model: int = 64
    ffn: int = 4
    attention_dropout: float = 0.5
    learning_rate: float = 5e-4
    average: float = 0.0
    epochs: int = 200
    patience: int = 10
    validation_users: int = 0
    alpha: float = 0.7
    """Share of the filter; the attention has the rest."""
    c: int = 5
    """The filter passes the lowest c // 2 + 1 frequencies; the others are weighted by beta."""


class BSARec(SASRec):
    """Shin et al., 2024 (arXiv 2312.10325), with the softmax over all items.

    Rows are padded on the left to `max_length`, and the filter mixes all places of a row, padding
    too: a later item would change the state of an earlier place. So a row has one target, the item
    after its end, and the prefixes of a user are rows of their own.

    As in the published code a user's first item is learned too, from a row of padding alone, but
    where there are soft targets. It differs in that the padding is no item of the softmax."""

    padding_d: Tensor

    def __init__(self, num_items: int, settings: BsarecSettings):
        super().__init__(num_items, settings)
        self.register_buffer("padding_d", torch.randn(settings.d_model) * settings.init_std)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = NORM_EPSILON

    def block(self, settings: SasrecSettings) -> Block:
        """A layer."""
        assert isinstance(settings, BsarecSettings)
        return BsarecBlock(settings)

    def states(self, packed: Packed, items_Id: Tensor) -> Tensor:
        """The state after each sequence, float32 [B, d], in the packed order."""
        segments, length = packed.attended.queries, self.settings.max_length
        offsets_S = torch.from_numpy(segments.offsets.astype("int64"))
        # The place from which a row is filled: 2 items of 5 places fill the places 3 and 4.
        rows_n = torch.repeat_interleave(torch.arange(len(offsets_S) - 1), offsets_S.diff())
        places_n = torch.arange(len(rows_n)) + (length - offsets_S[1:])[rows_n]
        filled_BL = torch.zeros(len(offsets_S) - 1, length, dtype=torch.bool)
        filled_BL[rows_n, places_n] = True
        items_nd = F.embedding(packed.items_n, items_Id)
        hidden_BLd = self.padding_d.expand(*filled_BL.shape, -1).index_put(
            (rows_n, places_n), items_nd
        )
        hidden_BLd = self.norm(hidden_BLd + self.position_embedding.weight)
        hidden_BLd = drop(hidden_BLd, self.settings.dropout, self.training)
        readable_BLL = filled_BL[:, None, :].expand(-1, length, -1).tril()
        mask_B1LL = torch.where(readable_BLL, 0.0, MASKED)[:, None]
        for block in self.blocks:
            hidden_BLd = block(hidden_BLd, mask_B1LL)
        return hidden_BLd[:, -1]

    def scores(self, packed: Packed) -> Tensor:
        """Of every item after each user's last position, float32 [B, I]."""
        lasts_S = torch.from_numpy(packed.attended.queries.offsets[1:].astype("int64") - 1)
        items_Id = self.item_rows()
        states_Bd = self.states(packed, items_Id)[torch.searchsorted(lasts_S, packed.last_B)]
        return states_Bd @ items_Id.T


class BsarecBlock(Block):
    """Filter and self-attention side by side, and a feed-forward layer."""

    low_pass_LL: Tensor

    def __init__(self, settings: BsarecSettings):
        super().__init__(settings)
        self.alpha = settings.alpha
        self.filter_norm = nn.LayerNorm(settings.d_model)
        self.sqrt_beta_d = nn.Parameter(torch.randn(settings.d_model))
        # The filter is linear: what it makes of each place alone is its matrix, and a product with
        # it takes half of the time of the transforms.
        length = settings.max_length
        spectrum = torch.fft.rfft(torch.eye(length), dim=0, norm="ortho")
        spectrum[settings.c // 2 + 1 :] = 0
        low_pass_LL = torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho")
        self.register_buffer("low_pass_LL", low_pass_LL, persistent=False)

    def forward(self, hidden_BLd: Tensor, mask_B1LL: Tensor) -> Tensor:  # type: ignore[override]
        low_BLd = self.low_pass_LL @ hidden_BLd
        filtered_BLd = low_BLd + self.sqrt_beta_d**2 * (hidden_BLd - low_BLd)
        filtered_BLd = self.filter_norm(self._add(hidden_BLd, filtered_BLd))
        attended_BLd = self._read(hidden_BLd, mask_B1LL)
        attended_BLd = self.attention_norm(self._add(hidden_BLd, attended_BLd))
        mixed_BLd = self.alpha * filtered_BLd + (1 - self.alpha) * attended_BLd
        fed_BLd = self.narrow(F.gelu(self.widen(mixed_BLd)))
        normed: Tensor = self.ffn_norm(self._add(mixed_BLd, fed_BLd))
        return normed

    def _read(self, hidden_BLd: Tensor, mask_B1LL: Tensor) -> Tensor:
        heads = (self.settings.heads, -1)
        query, key, value = (
            project(hidden_BLd).unflatten(-1, heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.settings.attention_dropout if self.training else 0.0
        mixed_BHLd = F.scaled_dot_product_attention(query, key, value, mask_B1LL, dropout)
        projected: Tensor = self.out(mixed_BHLd.transpose(1, 2).flatten(2))
        return projected
