"""The codes of items and users."""
