"""One rank of a trial on several processes: `train` as under torchrun, in a process that dies with
the trial's."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel end this process with the one that started it, whatever ends that (Linux;
    nothing elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.argv = ["genrec_dist.train", *sys.argv[2:]]
    runpy.run_module("genrec_dist.train", run_name="__main__", alter_sys=True)
