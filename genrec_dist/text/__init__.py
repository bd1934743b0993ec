"""Items' texts as a signal: vectors of them, and how near they are to a history's."""
