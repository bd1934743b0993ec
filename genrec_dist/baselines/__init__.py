"""Counting rules, kNN and SASRec in the same evaluator."""
