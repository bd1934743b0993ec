"""A file of tensors: copied to host memory at once, hashed while it is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Bytes that are hashed and written at a time."""


@dataclass(frozen=True)
class TensorFile:
    """What goes into a safetensors file."""

    name: str
    """Of the file."""
    tensors: dict[str, Tensor]
    """float32."""
    metadata: dict[str, str]
    """Of the header."""


class HostCopies:
    """Copies of tensors in host memory, which is allocated once and then used again. Of a tensor on
    a GPU the copy goes to pinned memory, in its turn among what the GPU has to do: nobody waits for
    it before `wait`."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies under the same names. Those of the last call under these names are lost."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[name] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record(torch.cuda.current_stream(tensor.device))
        return copies

    def wait(self) -> None:
        """Wait, in any thread, until all copies are there."""
        if self._copied is not None:
            torch.cuda.set_device(self._copied.device)  # or the thread would open the first GPU
            self._copied.synchronize()


def write_tensors(folder: Path, file: TensorFile, check: Callable[[], None]) -> tuple[int, str]:
    """Write a file in safetensors' format, whose bytes are then on the disk.

    Args:
        folder: that gets it.
        file: its tensors are in host memory.
        check: called before each chunk; what it raises ends the writing.

    Returns:
        How many bytes it has, and their sha256, which is made as they are written.
    """
    header: dict[str, Any] = {"__metadata__": file.metadata}
    end = 0
    for name, tensor in file.tensors.items():
        assert tensor.dtype == torch.float32, (name, tensor.dtype)
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    sha256 = hashlib.sha256()
    with (folder / file.name).open("wb") as out:
        start_of_file = len(text).to_bytes(8, "little") + text
        sha256.update(start_of_file)
        out.write(start_of_file)
        for tensor in file.tensors.values():
            data = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data
            for first in range(0, len(data), CHUNK):
                check()
                # Both let other threads run meanwhile.
                sha256.update(data[first : first + CHUNK])
                out.write(data[first : first + CHUNK])
        out.flush()
        os.fsync(out.fileno())
    return len(start_of_file) + end, sha256.hexdigest()
