"""A run directory at an address: what a node needs to continue a run that another node began.

Ray's own `storage_path` uploads what a trial reports as one new folder per checkpoint; a trial here
stays an ordinary run directory at the address too, so its files are copied one by one, in an order
in which a copy that is cut short is still a run that can be resumed.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from pathlib import Path

from genrec_shards.file_lock import LOCK_FILE, hold

from genrec_tuning.record import Folder


def push(local: Path, remote: Folder) -> None:
    """Send what is new of a run and remove what is gone. A checkpoint's `state.json` is sent after
    its other files, without which it is no checkpoint, and `events.jsonl` after all checkpoints.

    The ranks of a trial train on meanwhile: a file that they remove, as those of the oldest
    checkpoint, is left out."""
    if _same_place(local, remote):
        return
    there, here = _sizes(remote), _files(local)
    for name in sorted(here, key=_order):
        try:
            # Files of a checkpoint never change; others are small, or may change at equal size.
            is_there = there.get(name) == here[name].stat().st_size
            if not (name.startswith("checkpoints/") and is_there):
                remote.files.makedirs(posixpath.dirname(remote.place(name)), exist_ok=True)
                remote.files.put_file(str(here[name]), remote.place(name))
        except FileNotFoundError:
            if here[name].exists():
                raise
    for name in sorted(there.keys() - here.keys(), key=_order, reverse=True):
        remote.files.rm_file(remote.place(name))


def pull(local: Path, remote: Folder, wait: float = 0.0) -> None:
    """Fetch a run unless this place has a newer checkpoint of it. A checkpoint that `events.jsonl`
    does not name yet is left out: continued from it, the epochs before it would be in no record.

    What is here is replaced under the run's own lock, so never below a process that trains it.

    Args:
        local: the run directory of this node.
        remote: where the run lies.
        wait: seconds to wait for another process that trains the run here.

    Raises:
        ValueError: another process still does; names it.
    """
    if _same_place(local, remote):
        return
    there = _sizes(remote)
    if "events.jsonl" not in there:
        return
    events = remote.files.cat_file(remote.place("events.jsonl")).decode("utf-8", "replace")

    def is_named(name: str) -> bool:
        first, _, rest = name.partition("/")
        return first != "checkpoints" or f'"checkpoints/{rest.split("/")[0]}"' in events

    wanted = sorted(filter(is_named, there), key=_order)
    with hold(local / LOCK_FILE, "another process trains this run", wait):
        here = _files(local)
        # A copy that was cut short lacks the file that comes last.
        if _newest(wanted) <= (_newest(here) if "events.jsonl" in here else ""):
            return
        for path in local.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink(missing_ok=True)
        for name in wanted:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            remote.files.get_file(remote.place(name), str(local / name))


def _same_place(local: Path, remote: Folder) -> bool:
    return remote.is_local and Path(remote.path).absolute() == local.absolute()


def _files(local: Path) -> dict[str, Path]:
    """Relative names of a run's files; hidden ones, which are half-written, are left out."""
    # Not rglob, for which a folder that is removed meanwhile is an error.
    walked = (Path(folder) / name for folder, _, names in os.walk(local) for name in names)
    found = {path.relative_to(local): path for path in walked}
    return {
        str(name): path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _sizes(remote: Folder) -> dict[str, int]:
    remote.files.invalidate_cache()
    if not remote.files.exists(remote.path):
        return {}
    found = remote.files.find(remote.path, detail=True)
    return {posixpath.relpath(path, remote.path): facts["size"] for path, facts in found.items()}


def _newest(names: list[str] | dict[str, Path]) -> str:
    """The last whole checkpoint; its step is written with leading zeros."""
    states = (n for n in names if n.startswith("checkpoints/") and n.endswith("/state.json"))
    return max(states, default="")


def _order(name: str) -> tuple[int, str]:
    """Files that name others are sent after them."""
    return 2 if name == "events.jsonl" else 1 if name.endswith("/state.json") else 0, name
