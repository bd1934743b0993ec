"""Softmax over siblings: a token's share among those that can follow the same beginning in the
catalogue."""

# n label tokens, M nodes, W most siblings of a level, D width, F width of the item id table,
# K soft targets

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import SoftTargets
from genrec_dist.model.head_loss import head_loss, soft_difference
from genrec_dist.model.network import OutputRows


class Siblings(nn.Module):
    """The catalogue's trie as a softmax needs it. Nothing of it is learned or saved."""

    token_M: Tensor
    """int64, the token on the edge into a node; 0 at the root."""
    item_M: Tensor
    """int64, row + 1 of the one item below a node, 0 where there are several."""
    parent_M: Tensor
    """int64; 0 at the root."""
    first_child_M: Tensor
    """int64; children have consecutive numbers."""
    num_children_M: Tensor
    """int64."""

    def __init__(
        self,
        level_offsets: list[int],
        token_M: Tensor,
        item_M: Tensor,
        parent_M: Tensor,
        first_child_M: Tensor,
        num_children_M: Tensor,
    ):
        """`level_offsets`: first node of each level, and the number of nodes."""
        super().__init__()
        self.level_offsets = level_offsets
        bounds = list(pairwise(level_offsets))
        self.widths = [int(num_children_M[first:last].max()) for first, last in bounds]
        """Most children of a node, by level."""
        self.has_items = [bool(item_M[first:last].any()) for first, last in bounds[1:]]
        """Whether an item is alone below a child, by level of the parent."""
        buffers = {
            "token_M": token_M,
            "item_M": item_M,
            "parent_M": parent_M,
            "first_child_M": first_child_M,
            "num_children_M": num_children_M,
        }
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)

    def logits(
        self, level: int, hidden_nD: Tensor, nodes_n: Tensor, rows: OutputRows
    ) -> tuple[Tensor, Tensor]:
        """(logits [n, W] of the children of nodes of one level, bool [n, W]: which exist)."""
        slots_W = torch.arange(self.widths[level], device=nodes_n.device)
        exists_nW = slots_W < self.num_children_M[nodes_n, None]
        if level == 0:
            table_WE, hidden_nE = self._root(hidden_nD, rows)
            return F.linear(hidden_nE, table_WE), exists_nW
        children_nW = (self.first_child_M[nodes_n, None] + slots_W).masked_fill(~exists_nW, 0)
        first, last = self.level_offsets[level + 1 : level + 3]
        tokens_V, columns_m = self.token_M[first:last].unique(return_inverse=True)
        # Beginnings share their tokens: few columns in all, some of which each row reads.
        columns_nW = columns_m[(children_nW - first).clamp(min=0)]
        logits_nW = F.linear(hidden_nD, rows.token_VD[tokens_V]).gather(1, columns_nW)
        if rows.item_NF is not None and self.has_items[level]:
            item_nWF = F.embedding(self.item_M[children_nW], rows.item_NF)
            query_nF = _query(hidden_nD, rows)
            logits_nW = logits_nW + torch.bmm(item_nWF, query_nF[:, :, None])[:, :, 0]
        return logits_nW, exists_nW

    def loss(
        self,
        hidden_nD: Tensor,
        children_n: Tensor,
        rows: OutputRows,
        soft: SoftTargets | None = None,
        how: HeadLoss = "full",
    ) -> Tensor:
        """The summed cross-entropy of label tokens among their siblings, a float32 scalar.

        Args:
            hidden_nD: states of the label tokens.
            children_n: int64, the node that each label leads to.
            rows: the model's.
            soft: siblings of each label, as nodes, which take a part of its probability.
            how: the loss of the first level is computed.
        """
        total = hidden_nD.new_zeros((), dtype=torch.float32)
        for level in range(len(self.widths) - 1):
            first, last = self.level_offsets[level + 1 : level + 3]
            here = ((children_n >= first) & (children_n < last)).nonzero()[:, 0]
            hidden, children = hidden_nD[here], children_n[here]
            nodes = self.parent_M[children]
            start = self.first_child_M[nodes]
            part = None
            if soft is not None:
                part = SoftTargets(soft.tokens_nK[here] - start[:, None], soft.shares_nK[here])
            if level == 0:
                table_WE, hidden = self._root(hidden, rows)
                total = total + head_loss(hidden, table_WE, children - start, how=how)
                if part is not None:
                    total = total + soft_difference(hidden, table_WE, children - start, part)
                continue
            logits_nW, exists_nW = self.logits(level, hidden, nodes, rows)
            logp_nW = logits_nW.float().masked_fill(~exists_nW, float("-inf")).log_softmax(1)
            hard_n = logp_nW.gather(1, (children - start)[:, None])[:, 0]
            if part is not None:
                soft_nK = part.shares_nK * logp_nW.gather(1, part.tokens_nK)
                hard_n = hard_n * (1 - part.shares_nK.sum(1)) + soft_nK.sum(1)
            total = total - hard_n.sum()
        return total

    def _root(self, hidden_nD: Tensor, rows: OutputRows) -> tuple[Tensor, Tensor]:
        """(rows of the root's children, states to multiply them with). Of one product, so that no
        more than a chunk of the logits has to exist."""
        children = slice(1, 1 + self.widths[0])
        table_WD = rows.token_VD[self.token_M[children]]
        if rows.item_NF is None or not self.has_items[0]:
            return table_WD, hidden_nD
        item_WF = F.embedding(self.item_M[children], rows.item_NF)
        query_nF = _query(hidden_nD, rows).to(hidden_nD.dtype)
        return torch.cat([table_WD, item_WF], 1), torch.cat([hidden_nD, query_nF], 1)


def _query(hidden_nD: Tensor, rows: OutputRows) -> Tensor:
    """What the item id table is multiplied with: (P e) . h = e . (P^T h)."""
    if rows.projection_DF is None:
        return hidden_nD
    return F.linear(hidden_nD, rows.projection_DF.T)
