"""One step of training: its totals over ranks, and micro-batches of one size for a captured one."""
