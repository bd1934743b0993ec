"""The output head of a search: logits where a trie looks, and the softmax's normaliser without
keeping its logits."""

# B users, K beams, R rows, D width, V tokens of the softmax, M nodes, W most siblings of a level

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.decoding.trie import Trie
from genrec_dist.model.network import OutputRows
from genrec_dist.model.seq2seq.siblings import Siblings

CPU_LOGITS_AT_ONCE, GPU_LOGITS_AT_ONCE = 2**19, 2**26
"""Logits that exist at one time: on a CPU they stay in its cache between the product and the sum
(docs/log.md)."""
SAFE_LOGIT = 75.0
"""Sums of e^x do not overflow float32 where no |x| exceeds this, whatever the vocabulary below
10^5."""
BFLOAT16_ROUNDING = 3.1 * 2**-9
"""Bound of a logit's error in bfloat16, as a share of |row| |weight|: both factors and the product
are rounded, each by at most 2^-9 of itself."""
NEGLIGIBLE = 1e-5
"""Error of a log-probability that float32 itself makes between two orders of summing."""
FEWEST_ROWS, COLUMNS_OF_BFLOAT16, PROBED = 256, 512, 32


class Softmax:
    """log sum exp of the logits of rows over a set of tokens: all of the vocabulary, or those of a
    trie."""

    def __init__(self, weight_VD: Tensor, eos_column: int):
        """`eos_column`: which row of the weights is that of `</s>`."""
        self.weight_VD = weight_VD
        self.eos_column = eos_column
        self.longest = float(weight_VD.norm(dim=1).max())

    def log_normaliser(self, hidden_BKD: Tensor, eos_logit_BK: Tensor) -> Tensor:
        """float [B, K], in the weights' type.

        The logit of `</s>` is taken as given: after a whole item it is nearly all of the sum, and
        computed twice in two orders it would not cancel to the last digit.
        """
        rows_RD, eos_logit_R = hidden_BKD.flatten(0, -2), eos_logit_BK.flatten()
        on_cpu = rows_RD.device.type == "cpu"
        # Never fewer than make a product run at full speed.
        columns = max(1024, (CPU_LOGITS_AT_ONCE if on_cpu else GPU_LOGITS_AT_ONCE) // len(rows_RD))
        blocks = self._logit_blocks(rows_RD, eos_logit_R, columns)
        # To look at a value is free on a CPU, and elsewhere a wait.
        if on_cpu and not torch.compiler.is_compiling() and self._bounded(rows_RD):
            # Without the pass that looks for the largest logit.
            sum_R = rows_RD.new_zeros(len(rows_RD), dtype=torch.float64)
            for block_RV in blocks:
                sum_R += block_RV.exp_().sum(-1)
            total_R = sum_R.log_().to(rows_RD.dtype)
        else:
            totals = [block_RV.logsumexp(-1) for block_RV in blocks]
            total_R = totals[0] if len(totals) == 1 else torch.stack(totals).logsumexp(0)
        return total_R.unflatten(0, hidden_BKD.shape[:-1])

    def log_normaliser_after_items(self, hidden_BKD: Tensor, eos_logit_BK: Tensor) -> Tensor:
        """The same for rows after whole items, where `</s>` has nearly all of the probability.

        What the other tokens have together is so little that it need not be known to the last
        digit, and matrix units for bfloat16 are several times faster. With S the others' sum over
        e^(logit of `</s>`), log p(`</s>`) = -log(1 + S) moves by less than S does. Rows for which
        the worst case of rounding exceeds `NEGLIGIBLE` are computed in full.
        """
        rows_RD, eos_logit_R = hidden_BKD.flatten(0, -2), eos_logit_BK.flatten()
        error_R = torch.expm1(BFLOAT16_ROUNDING * self.longest * rows_RD.norm(dim=1))
        if not self._worth_bfloat16(rows_RD, eos_logit_R, error_R):
            return self.log_normaliser(hidden_BKD, eos_logit_BK)
        others_R = self._sum_of_others_in_bfloat16(rows_RD) * torch.exp(-eos_logit_R.double())
        total_R = (eos_logit_R + torch.log1p(others_R)).to(rows_RD.dtype)
        doubtful = (others_R * error_R > NEGLIGIBLE).nonzero()[:, 0]
        if len(doubtful):
            total_R[doubtful] = self.log_normaliser(rows_RD[doubtful], eos_logit_R[doubtful])
        return total_R.unflatten(0, hidden_BKD.shape[:-1])

    def _worth_bfloat16(self, rows_RD: Tensor, eos_logit_R: Tensor, error_R: Tensor) -> bool:
        """On a CPU with units for it, where few rows look doubtful."""
        if len(rows_RD) < FEWEST_ROWS or rows_RD.dtype != torch.float32:
            return False
        if not _has_bfloat16_units(rows_RD.device.type) or not self._bounded(rows_RD):
            return False
        some = slice(None, None, len(rows_RD) // PROBED)
        logprob_R = eos_logit_R[some] - self.log_normaliser(rows_RD[some], eos_logit_R[some])
        return bool((torch.expm1(-logprob_R) * error_R[some] < NEGLIGIBLE).float().mean() > 0.75)

    def _sum_of_others_in_bfloat16(self, rows_RD: Tensor) -> Tensor:
        """float64 [R], sum of e^logit over all tokens but `</s>`."""
        total_R = rows_RD.new_zeros(len(rows_RD), dtype=torch.float64)
        rows_RD = rows_RD.bfloat16()
        rounded = rows_RD.new_empty(len(rows_RD) * COLUMNS_OF_BFLOAT16)
        wide = torch.empty_like(rounded, dtype=torch.float32)
        for first in range(0, len(self.weight_VD), COLUMNS_OF_BFLOAT16):
            weight_VD = self._weight_in_bfloat16[first : first + COLUMNS_OF_BFLOAT16]
            size = len(rows_RD) * len(weight_VD)
            torch.mm(rows_RD, weight_VD.T, out=rounded[:size].view(len(rows_RD), -1))
            block_RV = wide[:size].copy_(rounded[:size]).view(len(rows_RD), -1)
            if first <= self.eos_column < first + COLUMNS_OF_BFLOAT16:
                block_RV[:, self.eos_column - first] = -torch.inf
            total_R += block_RV.exp_().sum(-1)
        return total_R

    @cached_property
    def _weight_in_bfloat16(self) -> Tensor:
        return self.weight_VD.bfloat16()

    def _bounded(self, rows_RD: Tensor) -> bool:
        """By Cauchy and Schwarz no logit is larger than the product of the longest row and the
        longest weight."""
        return float(rows_RD.norm(dim=1).max()) * self.longest <= SAFE_LOGIT

    def _logit_blocks(self, rows_RD: Tensor, eos_logit_R: Tensor, columns: int) -> Iterator[Tensor]:
        """The logits [R, <= columns], block after block; on a CPU in one buffer that is written
        again and again."""
        num_rows, buffer = len(rows_RD), None
        if rows_RD.device.type == "cpu" and not torch.compiler.is_compiling():
            buffer = rows_RD.new_empty(num_rows * min(columns, len(self.weight_VD)))
        for first in range(0, len(self.weight_VD), columns):
            weight_VD = self.weight_VD[first : first + columns]
            if buffer is None:
                block_RV = rows_RD @ weight_VD.T
            else:
                block_RV = buffer[: num_rows * len(weight_VD)].view(num_rows, len(weight_VD))
                torch.mm(rows_RD, weight_VD.T, out=block_RV)
            if first <= self.eos_column < first + columns:
                block_RV[:, self.eos_column - first] = eos_logit_R
            yield block_RV


@cache
def _has_bfloat16_units(device: str) -> bool:
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


class SiblingHead:
    """What a search multiplies decoder states with where tokens share with their siblings."""

    def __init__(self, siblings: Siblings, rows: OutputRows):
        """`rows`: on the device of `siblings`."""
        self.siblings, self.rows = siblings, rows

    def log_probabilities(self, level: int, hidden_BKD: Tensor, nodes_BK: Tensor) -> Tensor:
        """[B, K, 1 + W], fresh: of `</s>`, which follows no inner node, and of each child by its
        number among its siblings.

        Args:
            level: Of the nodes.
            hidden_BKD: Decoder states.
            nodes_BK: Numbers in the whole catalogue's trie.
        """
        weight_VD = self.rows.token_VD
        with torch.autocast(hidden_BKD.device.type, enabled=False):
            hidden_nD = hidden_BKD.to(weight_VD.dtype).flatten(0, 1)
            logits_nW, exists_nW = self.siblings.logits(
                level, hidden_nD, nodes_BK.flatten(), self.rows
            )
            logits_nW = logits_nW.masked_fill(~exists_nW, float("-inf"))
            logp_nW = logits_nW.log_softmax(1)
        ends_n1 = torch.full_like(logp_nW[:, :1], float("-inf"))
        return torch.cat([ends_n1, logp_nW], 1).unflatten(0, nodes_BK.shape)


def siblings_of(trie: Trie) -> Siblings:
    """The softmax over siblings of a whole catalogue.

    Raises:
        ValueError: An item's word is the beginning of another's.
    """
    inner = np.flatnonzero((trie.end_item >= 0) & (trie.num_children > 0))
    if len(inner):
        raise ValueError(
            f"tokens.softmax siblings: the word of item row {trie.end_item[inner[0]]} is the "
            "beginning of another's: prepare with hierarchical codes (--numbering collaborative), "
            "or set it to vocabulary"
        )
    # Items below each node, from the leaves up, and the sum of their rows: of one item its row.
    below_M, rows_M = np.zeros(trie.num_nodes, np.int64), np.zeros(trie.num_nodes, np.int64)
    below_M[trie.item_node] = 1
    rows_M[trie.item_node] = np.arange(len(trie.item_node)) + 1
    for level in range(trie.depth, 0, -1):
        nodes = slice(trie.level_offsets[level], trie.level_offsets[level + 1])
        np.add.at(below_M, trie.parent[nodes], below_M[nodes])
        np.add.at(rows_M, trie.parent[nodes], rows_M[nodes])
    arrays = (
        trie.token.clip(min=0),
        np.where(below_M == 1, rows_M, 0),
        trie.parent.clip(min=0),
        trie.first_child,
        trie.num_children,
    )
    tensors = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
    return Siblings(trie.level_offsets.tolist(), *tensors)


@dataclass(frozen=True)
class Heads:
    """What a search multiplies decoder states with."""

    levels: list[Tensor]
    """[1 + V_l, D] per level of the trie: `</s>` and the tokens that can follow there."""
    softmax: Softmax
    """Whose normaliser makes them probabilities."""
    siblings: SiblingHead | None = None
    """In place of both where tokens share with their siblings alone."""


def make_heads(weight_VD: Tensor, eos: int, tokens: Sequence[Tensor]) -> tuple[Heads, Heads]:
    """Heads of the softmax over all rows of the head, and of that over the trie's tokens alone.

    Args:
        weight_VD: The output head.
        eos: Token id of `</s>`, which belongs to both.
        tokens: int64 [V_l] per level of the trie.
    """
    columns = [F.pad(level, (1, 0), value=eos) for level in tokens]
    levels, used = [weight_VD[level] for level in columns], torch.cat(columns).unique()
    compact = Softmax(weight_VD[used], int(torch.searchsorted(used, eos)))
    return Heads(levels, Softmax(weight_VD, eos)), Heads(levels, compact)


def log_probabilities(heads: Heads, level: int, hidden_BKD: Tensor) -> Tensor:
    """[B, K, 1 + V_l], fresh, of `</s>` and the tokens of a level.

    Under autocast the head alone stays exact: rounded logits would tie by the hundred.
    """
    softmax, weight_VD = heads.softmax, heads.levels[level]
    # Where no token can follow, all rows are after whole items.
    after_items = level == len(heads.levels) - 1 and not torch.compiler.is_compiling()
    normalise = softmax.log_normaliser_after_items if after_items else softmax.log_normaliser
    with torch.autocast(hidden_BKD.device.type, enabled=False):
        hidden_BKD = hidden_BKD.to(weight_VD.dtype)
        logits_BKV = hidden_BKD @ weight_VD.T
        return logits_BKV.sub_(normalise(hidden_BKD, logits_BKV[..., 0])[..., None])
