"""The recipe: its schema, reading and checks."""
