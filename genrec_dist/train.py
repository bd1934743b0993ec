"""The entry of `accelerate launch -m genrec_dist.train` and torchrun."""

from __future__ import annotations

import os
import sys

from genrec_dist.distributed.gpu import set_gpu_defaults
from genrec_dist.distributed.threads import set_thread_defaults


def main(arguments: list[str] | None = None) -> int:
    """Run `genrec train` with these arguments and return its exit code:
    `python -m genrec_dist.train RECIPE [--set a.b=c ...] [--resume latest|PATH]`."""
    # Before torch is imported.
    set_thread_defaults()
    set_gpu_defaults()
    from genrec_dist.cli.app import run_command

    return run_command(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    code = main()
    import torch.distributed as dist

    launched = dist.is_available() and dist.is_initialized()
    if launched:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of collectives can outlive their groups; the interpreter's shutdown would then abort a
    # run that has succeeded.
    os._exit(code) if launched or code else sys.exit(0)
