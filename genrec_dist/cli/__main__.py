"""`python -m genrec_dist.cli`: the same as the command `genrec`."""

from genrec_dist.cli.app import main

main()
