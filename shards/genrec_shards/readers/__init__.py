"""Readers of logs: one module a format; each yields frames of user, item and time in the order of
the file."""
