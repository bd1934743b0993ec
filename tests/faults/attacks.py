"""What an attack is, what it works on, and when the program has held it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
from child import NOBODY
from two_ranks import environment

from genrec_dist.console import LONGEST_LINE

CHILD = Path(__file__).with_name("child.py")
PATIENCE = 120
"""Seconds of a processor that a command on tiny files may take, with its children that ended."""
WAIT = 900
"""Seconds after which it hangs, however many others want the processor."""
MEMORY = 2 << 30
"""Bytes that a command on tiny files may take beside what its libraries have mapped."""
VOLATILE = re.compile(r'"(time|seconds|users_per_second|pid)": [\d.e-]+')


class NotHeld(Exception):
    """The program has not held an attack; the text says what it did."""


@dataclass(frozen=True)
class Kind:
    """Attacks of one kind; each is drawn by its number and the seed."""

    name: str
    """GROUP.KIND."""
    share: int
    """Of a thousand attacks."""
    attack: Callable[[Box], None]

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


KINDS: dict[str, Kind] = {}


def kind(group: str, share: int) -> Callable[[Callable[[Box], None]], Callable[[Box], None]]:
    """Enter a function among the kinds. It raises NotHeld, and notes what it does."""

    def enter(function: Callable[[Box], None]) -> Callable[[Box], None]:
        name = f"{group}.{function.__name__}"
        KINDS[name] = Kind(name, share, function)
        return function

    return enter


@dataclass(frozen=True)
class Result:
    """Of one attack."""

    name: str
    """GROUP.KIND:NUMBER."""
    reason: str
    """Why it was not held; "" where it was."""
    notes: str
    seconds: float

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


class Box:
    """A folder of one attack's own, its dice, and the ways to run the program there."""

    def __init__(self, world: Path, folder: Path, dice: random.Random):
        self.world, self.folder, self.dice = world, folder, dice
        self.notes: list[str] = []
        self._orders = 0

    def note(self, text: str) -> None:
        """Say what the attack does, for who has to repeat it."""
        self.notes.append(text)

    def copy(self, name: str) -> Path:
        """A copy of a file or folder of the world."""
        source, target = self.world / name, self.folder / Path(name).name
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, target))

    def damage(self, path: Path, how: Callable[[bytes, random.Random], tuple[bytes, str]]) -> None:
        """Replace a file's content by `how` it is damaged."""
        content, what = how(path.read_bytes(), self.dice)
        path.write_bytes(content)
        self.note(f"{path.relative_to(self.folder)}: {what}")

    def start(self, *arguments: object, **order: Any) -> forked.Started:
        """Start a command: `genrec ARGUMENTS`, or `read-shards ADDRESS CACHE`.

        Args:
            arguments: of the command, `WORLD` and `OUT` for the world and an output of its own.
            order: `at` (the file operation at which `signal` comes), `file_limit` (bytes; with
                SIGXFSZ as `signal` the write that passes it kills), `nobody` (as a user without
                rights), `env`.
        """
        self._orders += 1
        own = self.folder / f".order-{self._orders}"
        own.mkdir()
        env = environment(HOME=str(self.folder), TMPDIR=str(self.folder), CUDA_VISIBLE_DEVICES="")
        env |= {"GENREC_CACHE": str(self.folder / "cache"), "COLUMNS": "200"}
        env |= order.pop("env", {})
        given = {"at": None, "signal": int(signal.SIGKILL), "file_limit": None, "nobody": False}
        given |= {"memory": MEMORY, "folder": str(self.folder), "count": str(own / "count")} | order
        given["nobody"] = given["nobody"] and os.getuid() == 0
        given["arguments"] = [self.filled(str(argument)) for argument in arguments]
        (own / "order.json").write_text(json.dumps(given))
        for path in (own, self.folder) if given["nobody"] else ():
            os.chown(path, NOBODY, NOBODY)
        return forked.Started([CHILD, own / "order.json"], own / "out", own / "err", env)

    def end(self, process: forked.Started) -> Ended:
        """Wait for a command. Raises NotHeld where it does not end, or ends in another way than a
        command may."""
        until = time.monotonic() + WAIT
        try:
            while (done := waited(process)) is None:
                if (used := processor_seconds(process.pid)) > PATIENCE:
                    raise NotHeld(f"no end within {used:.0f} s of a processor")
                if time.monotonic() > until:
                    raise NotHeld(f"no end within {WAIT} s")
        except UnicodeDecodeError as error:
            raise NotHeld(f"its output is no UTF-8: {error}") from None
        finally:
            process.kill()
        return Ended(done.returncode, done.stdout, done.stderr)

    def run(self, *arguments: object, **order: Any) -> Ended:
        """Start a command and wait for it."""
        return self.end(self.start(*arguments, **order))

    def filled(self, argument: str) -> str:
        return argument.replace("WORLD", str(self.world)).replace("OUT", str(self.out))

    @property
    def out(self) -> Path:
        """Where `OUT` is."""
        return self.folder / "out"

    def outcome(self, ended: Ended) -> dict[str, object]:
        """What a command has written into `OUT`, or, where that is not there, printed."""
        return content(self.out) if self.out.is_dir() else {"standard output": ended.out}

    def operations(self) -> int:
        """File operations of the last command, where they were counted."""
        return int((self.folder / f".order-{self._orders}" / "count").read_text())


def waited(process: forked.Started) -> subprocess.CompletedProcess[str] | None:
    """How a process has ended, after at most a second; None where it goes on."""
    try:
        return process.wait(1)
    except subprocess.TimeoutExpired:
        return None


def processor_seconds(pid: int) -> float:
    """What a process and its children that ended have used; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a command ended: never in a traceback, a panic or raw control characters."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        for sign in ("Traceback (most recent call last)", "panicked at", "Original Traceback"):
            if sign in self.err:
                last = [line for line in self.err.splitlines() if line.strip()][-1]
                raise NotHeld(f"a traceback: {last[:200]}")
        if found := re.search(r"[\x00-\x08\x0b-\x1f\x7f]", self.err):
            raise NotHeld(f"raw {found[0]!r} on standard error")
        if self.code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
            raise NotHeld(f"ended by {signal.Signals(-self.code).name}: {self.err[-200:]}")

    @property
    def told(self) -> str:
        """The last line on standard error."""
        return (self.err.splitlines() or [""])[-1]

    def refused(self, *places: object) -> bool:
        """Whether the command was refused, in one line that names one of `places`; False where it
        succeeded. Raises NotHeld for any other end."""
        if self.code == 0:
            return False
        if self.code not in (1, 2):
            raise NotHeld(f"exit code {self.code}: {self.told[:200]}")
        lines = [line for line in self.err.splitlines() if line.startswith("genrec: ")]
        if len(lines) != 1 or self.told != lines[0]:
            raise NotHeld(f"not one line, but: {self.err[-300:]!r}")
        if len(self.told) > LONGEST_LINE + 200:  # the program's name and a question are added
            raise NotHeld(f"a line of {len(self.told)} characters: {self.told[:100]}")
        if places and not any(str(place) in self.told for place in places):
            raise NotHeld(f"names none of {', '.join(map(str, places))[:200]}: {self.told[:300]}")
        return True

    def must_end(self, *codes: int) -> None:
        """Raise NotHeld unless the exit code is one of these."""
        if self.code not in codes:
            raise NotHeld(f"exit code {self.code}, not {codes}: {self.err[-300:]}")


def content(folder: Path) -> dict[str, object]:
    """What the files of a folder hold, but for times and hidden files: of safetensors the header
    and the bytes behind it, since two writings may order the header in another way."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(".") or "/." in name:
            continue
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            found[name] = (json.loads(data[8:end]), hashlib.sha256(data[end:]).hexdigest())
        elif path.suffix == ".json":
            found[name] = VOLATILE.sub("", data.decode())
        elif path.suffix != ".html":
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def must_equal(
    found: dict[str, object], expected: dict[str, object], what: str, but: str = ""
) -> None:
    """Raise NotHeld, naming the files that differ."""
    names = (found.keys() | expected.keys()) - {but}
    if differing := sorted(name for name in names if found.get(name) != expected.get(name)):
        raise NotHeld(f"{what}: other {', '.join(differing)[:200]} than undisturbed")


def left_over(folder: Path) -> list[str]:
    """Names of temporary files and directories of the program."""
    found = (path for path in folder.rglob(".*.*") if path.suffix in (".tmp", ".old"))
    return sorted(str(path.relative_to(folder)) for path in found)
