"""Measurements against named peers: one file a claim, started by `genrec bench`."""
