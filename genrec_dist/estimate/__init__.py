"""What a run will take: operations, memory and time."""
