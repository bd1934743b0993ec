"""Titles and the text around them, as tokens."""
