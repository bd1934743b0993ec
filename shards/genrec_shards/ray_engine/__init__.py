"""Logs that outgrow one machine: read, cleaned and packed by tasks of Ray, to the byte as one
machine would.

Plain tasks and not Ray Data: the first bad line, the unit of times and `--ties keep` are the log's
order, which its shuffles give up, and a round of the core needs each bucket once more, where it
lies."""
