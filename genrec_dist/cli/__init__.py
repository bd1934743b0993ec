"""The commands of `genrec`; `app.py` puts them together."""
