"""Logs that outgrow one machine: read, cleaned and packed by tasks of Ray, to the byte as one
machine would.

Plain tasks and not Ray Data: the first bad line, the unit of times and `--ties keep` depend on the
log's order, which its shuffles give up, and each round of the core needs every bucket again, on the
node that holds it."""
