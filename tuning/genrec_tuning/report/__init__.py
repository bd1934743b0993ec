"""The page of a sweep: its charts, its tables and what it says of the trials."""
