"""The samples of a step: their targets, and how they become micro-batches."""
