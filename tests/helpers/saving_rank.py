"""One rank of a training whose checkpoints meet with an accident.

`saving_rank.py ACCIDENT RANK ARGUMENTS...`: `genrec train ARGUMENTS`, in which rank RANK

    kill    ends by SIGKILL amid the writing of its second checkpoint, some of whose bytes are
            written and some are not
    full    has no room for a file of its second checkpoint
    clock   has a clock that is far ahead
"""

from __future__ import annotations

import errno
import itertools
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable

from genrec_dist.training.saving import tensor_file, writer


def main(accident: str, who: int) -> None:
    if os.environ.get("RANK", "0") != str(who):
        return
    if accident == "clock":
        real = time.monotonic
        readings = itertools.count()
        time.monotonic = lambda: 1e6 * next(readings) + real()  # type: ignore[assignment]
        return
    write_tensors, files = writer.write_tensors, []
    tensor_file.CHUNK = 1024

    def write(folder: os.PathLike[str], file: tensor_file.TensorFile, check: Callable[[], None]):
        files.append(folder)
        chunks = []

        def end() -> None:
            chunks.append(None)
            if len(set(files)) == 2 and len(chunks) == 3:
                if accident == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            check()

        return write_tensors(folder, file, end)

    writer.write_tensors = write


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    sys.argv = ["genrec_dist.train", *sys.argv[3:]]
    sys.modules.pop("genrec_dist.train", None)
    runpy.run_module("genrec_dist.train", run_name="__main__", alter_sys=True)
