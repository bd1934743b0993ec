"""One command of the program, with the fault that was prepared for it: `child.py ORDER.json`."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

import numpy as np

NOBODY = 65534
WRITING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link")
"""Events of Python's audit that change the disk, beside an `open` for writing."""


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    os.chdir(Path(sys.argv[1]).parent)
    if order["nobody"]:
        become_nobody()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + order["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
        if order["signal"] == signal.SIGXFSZ:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills amid the write
    operations = Operations(order["folder"], order["at"], order["signal"])
    if order["at"] is not None:
        operations.watch()
    if order["arguments"][0] == "read-shards":
        from genrec_dist.console import exit_code_of

        sys.exit(exit_code_of(lambda: read_shards(*order["arguments"][1:])))
    from genrec_dist.cli.app import main as genrec

    sys.argv = ["genrec", *order["arguments"]]
    try:
        genrec()
    finally:
        Path(order["count"]).write_text(str(operations.done))


def become_nobody() -> None:
    """Go on as a user who may read what root may, and write what anybody may."""
    libc = ctypes.CDLL(None, use_errno=True)
    read = 1 << 2  # CAP_DAC_READ_SEARCH, since Python itself may be installed below /root
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", read, read, 0, 0, 0, 0)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


class Operations:
    """Counts what is done to files below a folder; a signal comes at one of the operations."""

    def __init__(self, folder: str, at: int | None, number: int):
        self.folder, self.at, self.number, self.done = folder, at, number, 0

    def watch(self) -> None:
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            self.note(name)
            fsync(descriptor)
            self.note(name)

        os.fsync = counted
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.note(path)
        elif event in WRITING:
            self.note(arguments[0])

    def note(self, path: object) -> None:
        if str(path).startswith(self.folder):
            self.done += 1
            if self.done == self.at:
                os.kill(os.getpid(), self.number)


def read_shards(address: str, cache: str) -> None:
    """Print a digest of all sequences that the shards hold."""
    import hashlib

    from genrec_shards.storage.reader import ShardReader
    from genrec_shards.storage.remote import RetryPolicy

    retry = RetryPolicy(attempts=3, first_wait=0.02, longest_wait=0.1, stall=0.5, deadline=20)
    reader = ShardReader(address, retry=retry, cache_dir=cache)
    items, offsets = reader.gather(np.arange(reader.manifest.users))
    print(hashlib.sha256(items.tobytes() + offsets.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
