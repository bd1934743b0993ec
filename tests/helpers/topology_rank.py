"""One rank of test_topology.py: really launched, it asks for one thing after the other and tells
what the check said."""

from __future__ import annotations

import json
import os
import sys

import deepspeed
from accelerate import Accelerator, InitProcessGroupKwargs

from genrec_dist.distributed import launch_check as topology


def said(accelerator: Accelerator, expect: str, precision: str = "bf16") -> str:
    os.environ["GENREC_EXPECT"] = expect
    try:
        topology.check(accelerator, precision)
    except ValueError as error:
        return str(error)
    return "well"


def main() -> None:
    # As the program does: DeepSpeed would compile a collective of its own, under a lock that a
    # killed process leaves to all later ones.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = Accelerator(
        mixed_precision="bf16", kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    rank = accelerator.process_index
    answers = {
        "got": topology.gotten(accelerator),
        "nothing more": said(accelerator, ""),
        "the same": said(accelerator, "processes=2,zero=2,precision=bf16,device=cpu"),
        "another stage": said(accelerator, "zero=3"),
        "another precision": said(accelerator, "", precision="fp32"),
        "another number": said(accelerator, "processes=4"),
        "one rank asks for more": said(accelerator, "zero=1" if rank == 1 else ""),
        "one rank cannot be read": said(accelerator, "zeros=1" if rank == 0 else ""),
    }
    # As if this rank alone had been started with another file.
    accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 2 + rank
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    topology.launch_above = lambda: None
    answers["ranks differ"] = said(accelerator, "")
    with open(f"{sys.argv[1]}/rank-{rank}.json", "w", encoding="utf-8") as file:
        json.dump(answers, file)
    accelerator.end_training()


if __name__ == "__main__":
    main()
