"""A trained run's lists: loading, ranking, evaluation and recommendation."""
