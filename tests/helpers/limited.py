"""`genrec ARGUMENTS` in a process that may write no file beyond a size, as on a full disk:
`limited.py BYTES ARGUMENTS`."""

import resource
import sys

from genrec_dist.cli.app import main

if __name__ == "__main__":
    size = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    main()
