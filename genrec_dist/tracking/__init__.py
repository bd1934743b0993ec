"""What a run logs: its events, and the trackers that get them."""
