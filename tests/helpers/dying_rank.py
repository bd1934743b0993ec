"""One rank of a training that loses a rank inside a collective of DDP's or DeepSpeed's own.

`dying_rank.py WHO STEP NOTE ARGUMENTS...`: `genrec train ARGUMENTS`, in which rank WHO kills itself
with SIGKILL in the backward pass of STEP, while the others wait for its gradients, and leaves the
time of its end in the file NOTE."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch import Tensor

from genrec_dist.training.loop import Loop


def main(who: int, step: int, note: Path) -> None:
    def die(_: Tensor) -> None:
        time.sleep(0.3)  # the others are in the collective by now
        note.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    real = Loop.take_step

    def take_step(self: Loop, at: int, *rest: object) -> object:
        if (self.ranks.rank, at) == (who, step):
            backward = self.engine.backward

            def die_in(loss: Tensor) -> None:
                loss.register_hook(die)
                backward(loss)

            self.engine.backward = die_in
        return real(self, at, *rest)  # type: ignore[arg-type]

    Loop.take_step = take_step  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.argv = ["genrec_dist.train", *sys.argv[4:]]
    sys.modules.pop("genrec_dist.train", None)
    runpy.run_module("genrec_dist.train", run_name="__main__", alter_sys=True)
