"""Shards: written, read, cached, and the order of samples."""
