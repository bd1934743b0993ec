"""GenRec: generative sequential recommendation, trained at any scale."""
