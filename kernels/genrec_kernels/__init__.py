"""The fused operations of GenRec and their specifications in plain torch."""
