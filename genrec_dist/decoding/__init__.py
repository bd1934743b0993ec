"""The trie of items and the beam search over it."""
