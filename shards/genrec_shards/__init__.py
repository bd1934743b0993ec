"""From raw interactions to sequences, shards and the order of samples."""
