"""Two ranks of which the first leaves before the second makes a group of its own."""

from __future__ import annotations

import os
import signal
import time

import torch.distributed as dist

from genrec_dist.distributed.collectives import Ranks, join
from genrec_dist.distributed.signals import RankGone


def main() -> None:
    join()
    ranks = Ranks()
    ranks.barrier()
    if ranks.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    try:
        with ranks.naming_the_gone():
            dist.new_group(backend="gloo")
    except RankGone as error:
        print(error)


if __name__ == "__main__":
    main()
