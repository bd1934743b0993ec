"""Checkpoints on their way to the disk, while the training goes on."""
