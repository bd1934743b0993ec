"""A log's rows to clean interactions, in memory that is bounded."""
