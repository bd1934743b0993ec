"""From one file to the tables of both protocols: steps whose results are kept and never redone."""
