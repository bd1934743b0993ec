"""The loss: cross-entropy of target tokens, normalised by all target tokens of the step."""

# n label tokens, V vocabulary

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def target_loss(logits_nV: Tensor, labels_n: Tensor, num_target_tokens: int, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the tokens' cross-entropies over `num_target_tokens`, the target tokens of the whole step.

    Dividing by the step's total, not the micro-batch's, makes the gradient independent of how the step is cut.
    """
    total = F.cross_entropy(logits_nV.float(), labels_n, reduction="sum", label_smoothing=label_smoothing)
    return total / max(num_target_tokens, 1)
