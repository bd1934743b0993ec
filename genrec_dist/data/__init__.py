"""Item sequences to batches: tokens, masks, prefix samples and packing."""
