"""Which tokens of padded rows go through the layers, one after another and each once."""

# B rows, L places of a row, n tokens that go through the layers

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """The way from padded rows to packed tokens and back."""

    places_n: Tensor
    """int64, where a packed token is in the flattened rows."""
    sources_BL: Tensor
    """int64, the packed token that a place holds; 0 where it holds none."""

    @classmethod
    def of(cls, real_BL: Tensor, num_shared: int = 0) -> PackedRows:
        """All real tokens.

        Args:
            real_BL: bool, False where a row holds no token.
            num_shared: so many leading tokens are those of the first row in all rows.
        """
        # Rows a b c d, a b e: two shared tokens, a place without a token is -.
        #   alone_BL   [[1, 1, 1, 1], [0, 0, 1, 0]]    places_n [0, 1, 2, 3, 6]: a b c d e
        #   sources_BL [[0, 1, 2, 3], [0, 1, 4, -]]
        alone_BL = real_BL.clone()
        alone_BL[1:, :num_shared] = False
        places_n = alone_BL.flatten().nonzero()[:, 0]
        sources_BL = torch.zeros_like(real_BL, dtype=torch.long)
        sources_BL.view(-1)[places_n] = torch.arange(len(places_n), device=places_n.device)
        sources_BL[:, :num_shared] = sources_BL[:1, :num_shared]
        return cls(places_n, sources_BL)

    def pack(self, values_BL: Tensor) -> Tensor:
        """What is at the packed tokens' places, [n, ...]."""
        return values_BL.flatten(0, 1)[self.places_n]

    def unpack(self, values_n: Tensor) -> Tensor:
        """Packed tokens' values at all of their places, [B, L, ...]; any elsewhere."""
        return values_n[self.sources_BL]


def num_shared(tokens_BL: Tensor, real_BL: Tensor) -> int:
    """How many leading tokens all rows have in common."""
    same_L = ((tokens_BL == tokens_BL[:1]) & real_BL).all(0)
    return int(same_L.long().cumprod(0).sum())
