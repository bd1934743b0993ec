"""The doors of the command line, by what they lead to; `cli.py` is the house's own."""
