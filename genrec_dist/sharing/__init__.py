"""A run for others: what of it is uploaded, its model card, and the upload."""
