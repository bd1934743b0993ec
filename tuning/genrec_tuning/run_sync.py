"""A run's directory at an address: what a node needs to go on with a run that another node
began."""

from __future__ import annotations

import posixpath
import shutil
from pathlib import Path

from genrec_tuning.record import Folder


class Mirror:
    """Keeps `remote` as the run directory `local` is; nothing where they are the same place."""

    def __init__(self, local: Path, remote: Folder):
        self.local, self.remote = local, remote
        self.active = not remote.is_local or Path(remote.path).absolute() != local.absolute()

    def push(self) -> None:
        """Send what is new. A checkpoint's `state.json` goes last: without it a checkpoint is
        none."""
        if not self.active:
            return
        there = self._sizes()
        here = {
            str(path.relative_to(self.local)): path
            for path in self.local.rglob("*")
            if _travels(path)
        }
        for name in sorted(here, key=lambda name: (_rank(name), name)):
            # Files of a checkpoint never change; the others are small, or best/ which may change at
            # equal size.
            if not (
                name.startswith("checkpoints/") and there.get(name) == here[name].stat().st_size
            ):
                self._put(here[name], name)
        for name in sorted(there.keys() - here.keys(), key=_rank, reverse=True):
            self.remote.files.rm_file(self.remote.place(name))

    def pull(self) -> None:
        """Fetch the run, unless this place has got further itself.

        A checkpoint that was sent and whose events were not is left: going on from it, the epochs
        before it would be in no record."""
        if not self.active:
            return
        there = self._sizes()
        if "events.jsonl" not in there:
            return
        told = self.remote.files.cat_file(self.remote.place("events.jsonl")).decode(
            "utf-8", "replace"
        )
        there = {name: size for name, size in there.items() if _is_told(name, told)}
        if not there or self._newest(there) <= self._newest(
            {str(p.relative_to(self.local)) for p in self._local_files()}
        ):
            return
        shutil.rmtree(self.local, ignore_errors=True)
        for name in sorted(there, key=lambda name: (_rank(name), name)):
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.remote.files.get_file(self.remote.place(name), str(target))

    def _local_files(self) -> list[Path]:
        return [path for path in self.local.rglob("*") if _travels(path)]

    def _put(self, path: Path, name: str) -> None:
        self.remote.files.makedirs(posixpath.dirname(self.remote.place(name)), exist_ok=True)
        self.remote.files.put_file(str(path), self.remote.place(name))

    def _sizes(self) -> dict[str, int]:
        self.remote.files.invalidate_cache()
        if not self.remote.files.exists(self.remote.path):
            return {}
        found = self.remote.files.find(self.remote.path, detail=True)
        return {
            posixpath.relpath(path, self.remote.path): facts["size"]
            for path, facts in found.items()
        }

    @staticmethod
    def _newest(names: dict[str, int] | set[str]) -> str:
        """The last whole checkpoint; steps are written with leading zeros."""
        return max(
            (
                name
                for name in names
                if name.startswith("checkpoints/") and name.endswith("/state.json")
            ),
            default="",
        )


def _travels(path: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.parts[-4:])


def _is_told(name: str, events: str) -> bool:
    """Whether the events speak of the checkpoint that a file is of."""
    first, _, rest = name.partition("/")
    return first != "checkpoints" or f'"checkpoints/{rest.split("/")[0]}"' in events


def _rank(name: str) -> int:
    """What is sent later may speak of what was sent before."""
    return 2 if name == "events.jsonl" else 1 if name.endswith("/state.json") else 0
