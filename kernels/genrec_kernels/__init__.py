"""The fused operations of GenRec and their specifications in plain torch."""

from genrec_kernels.embedding import embedding_sum, wants_plan
from genrec_kernels.gradient_order import Rows, SumPlan, plan_sum

__all__ = ["Rows", "SumPlan", "embedding_sum", "plan_sum", "wants_plan"]
