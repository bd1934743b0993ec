"""Where things lie under one directory, and what each step needs to know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genrec_shards.dataset import Dataset, load_dataset

from genrec_dist.distributed.deadline import Deadline
from genrec_dist.reproduce.systems import Decoded, ProtocolName, Rule, System

NUMBERINGS: dict[ProtocolName, Literal["random", "given"]] = {
    "leak-free": "random",
    "paper": "given",
}


@dataclass
class Place:
    """A directory of `genrec reproduce`."""

    out: Path
    source: Path
    """The file of sequences."""
    seeds: int
    ending: Deadline
    say: Callable[[str], None]
    _datasets: dict[str, Dataset] = field(default_factory=dict)

    def data(self, protocol: ProtocolName) -> Path:
        return self.out / protocol / "data"

    def dataset(self, protocol: ProtocolName) -> Dataset:
        if protocol not in self._datasets:
            self._datasets[protocol] = load_dataset(self.data(protocol))
        return self._datasets[protocol]

    def folder(self, protocol: ProtocolName, system: System) -> Path:
        """Of a system: of its runs, or of the one run of a rule."""
        return self.out / protocol / system.name

    def runs(self, protocol: ProtocolName, system: System) -> list[Path]:
        """Where the metrics of a system lie, seed by seed."""
        folder = self.folder(protocol, system)
        return (
            [folder]
            if isinstance(system, Rule)
            else [folder / f"seed-{seed}" for seed in range(self.seeds)]
        )

    def trained(self, protocol: ProtocolName, system: Decoded, seed: int) -> Path:
        """The run that a system lists in its own way."""
        return self.runs(protocol, system.of)[seed]

    def check_source(self, protocol: ProtocolName) -> None:
        """Raise ValueError where the data directory was made of another file than the one that is
        given."""
        path = self.data(protocol) / "dataset.json"
        if not path.is_file():
            return
        theirs = json.loads(path.read_text(encoding="utf-8"))["source"]["sha256"]
        with self.source.open("rb") as file:
            ours = hashlib.file_digest(file, "sha256").hexdigest()
        if theirs != ours:
            raise ValueError(
                f"{self.data(protocol)} was made of another file than {self.source}: choose another --out"
            )


def read_metrics(run: Path) -> dict[str, Any] | None:
    """What the evaluation of a run on test left; None where there is none yet."""
    path = run / "metrics-test.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        {key: found[key] for key in ("protocol", "ci95", "users", "seconds", "recipe")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a metrics file of this program ({error}): remove it, and run again"
        ) from None
    return found
