"""Keys and values that each beam of a search has of its own, and attention over them."""

# B users, K beams, H heads, P prefix tokens, t tokens of a beam since then, d width of a head

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor


class BeamCaches:
    """What beams keep of their own tokens, and how they pass it on."""

    own: list[tuple[Tensor, Tensor] | None]
    """Keys and values [B, K, ...] of each layer."""

    def reorder_beams(self, parent_BK: Tensor) -> None:
        """Let each beam continue the beam `parent_BK` names; the number of beams may change."""
        rows_B1 = torch.arange(len(parent_BK), device=parent_BK.device)[:, None]
        self.own = [
            pair and (pair[0][rows_B1, parent_BK], pair[1][rows_B1, parent_BK]) for pair in self.own
        ]

    def add_own(self, layer: int, key_BKHd: Tensor, value_BKHd: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the key and value of one token more per beam; returns all of a layer, each
        [B, K, H, t, d]."""
        keys, values = key_BKHd[:, :, :, None], value_BKHd[:, :, :, None]
        past = self.own[layer]
        if past is not None:
            keys, values = torch.cat([past[0], keys], 3), torch.cat([past[1], values], 3)
        self.own[layer] = (keys, values)
        return keys, values

    def fork(self, parent_BK: Tensor) -> Self:
        """Another search from here, as after `reorder_beams`; this one stays as it is."""
        other = copy.copy(self)
        other.reorder_beams(parent_BK)
        return other


def attend_beams(
    query_BKHd: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    scale: float,
    bias_Ht: Tensor | None = None,
) -> Tensor:
    """The mixed values [B, K, H d] of one token per beam, over the shared prefix by matrix products
    and over a beam's own few tokens element by element.

    Args:
        query_BKHd: of the tokens.
        prefix: keys and values [B, H, P, d].
        own: keys and values [B, K, H, t, d], the token's own included.
        scale: of the products.
        bias_Ht: [H, P + t], added to the scores after that.
    """
    (prefix_keys, prefix_values), (keys, values) = prefix, own
    on_prefix = (query_BKHd.transpose(1, 2) @ prefix_keys.transpose(2, 3)).transpose(1, 2)
    on_own = (query_BKHd[:, :, :, None] * keys).sum(-1)
    scores = torch.cat([on_prefix, on_own], -1).mul_(scale)
    if bias_Ht is not None:
        scores = scores + bias_Ht
    weights, num_prefix = scores.softmax(-1), prefix_keys.shape[2]
    from_prefix = (weights[..., :num_prefix].transpose(1, 2) @ prefix_values).transpose(1, 2)
    from_own = (weights[..., num_prefix:, None] * values).sum(3)
    return (from_prefix + from_own).flatten(2)
