"""`python -m genrec_dist.cli`: the same as the command `genrec`."""

from genrec_dist.cli.app import main

if __name__ == "__main__":
    main()
