"""Metrics of ranked lists, the results files, and paired comparison."""
