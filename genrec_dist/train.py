"""Training: pretrain, then finetune, from one recipe; one loop that reads top to bottom."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def main(arguments: list[str] | None = None) -> int:
    """`python -m genrec_dist.train RECIPE [--set a.b=c ...] [--resume latest|PATH]`, for accelerate
    launch and torchrun."""
    from genrec_dist.cli.app import run_command

    return run_command(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    code = main()
    launched = dist.is_available() and dist.is_initialized()
    if launched:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of collectives can outlive their groups; the interpreter's end would then abort a run
    # that has ended well.
    os._exit(code) if launched or code else sys.exit(0)
