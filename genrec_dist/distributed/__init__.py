"""Processes that work together: collectives, launch checks, signals, deadlines."""
