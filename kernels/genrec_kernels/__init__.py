"""The fused operations of GenRec and their specifications in plain torch."""

from genrec_kernels.embedding import embedding_sum, launch_problem, wants_gradient_order
from genrec_kernels.gradient_order import GradientOrder, Rows, make_gradient_order
from genrec_kernels.torch_reference import EmbeddingTables

__all__ = [
    "EmbeddingTables",
    "GradientOrder",
    "Rows",
    "embedding_sum",
    "launch_problem",
    "make_gradient_order",
    "wants_gradient_order",
]
