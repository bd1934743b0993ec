"""What a process sets for a GPU before torch is imported, and why it cannot use one that is
there."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_gpu_defaults(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the environment of torch's allocator on GPUs where the user has not: to be called before
    torch is imported.

    The shapes of padded micro-batches differ from step to step. Segments that can grow keep what is
    free from lying in pieces of shapes that do not come again."""
    environment = os.environ if environment is None else environment
    if not environment.keys() & set(_ALLOCATOR):
        environment[_ALLOCATOR[0]] = "expandable_segments:True"


def unusable_gpu(driver: Path = DRIVER) -> str:
    """Why torch cannot use this machine's NVIDIA GPU, with the way out, in one line; "" where it
    can, where there is none, and where GPUs are hidden on purpose.

    `driver`: the file in which NVIDIA's kernel module says its version."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if hidden or on_cpu or not driver.is_file() or torch.cuda.is_available():
        return ""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", driver.read_text(encoding="utf-8"))
    version = f"driver {found[0]}" if found else "driver"
    cuda = torch.version.cuda
    if cuda is None:
        return (
            f"this machine has an NVIDIA {version}, and torch {torch.__version__} is built without "
            "CUDA: the CPU is used; install torch's CUDA build"
        )
    return (
        f"this machine has an NVIDIA {version}, which torch {torch.__version__} (built for CUDA "
        f"{cuda}) cannot use: the CPU is used; update the driver, or install a torch that is built "
        "for an older CUDA"
    )
