"""The trace of a few steps: readable, of the steps asked for, and no half of one under its name."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from genrec_dist.training.profiling import WARM_UP, Trace


def steps_of(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [
        event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")
    ]


def go(trace: Trace, steps: int) -> None:
    with trace:
        for _ in range(steps):
            torch.ones(8, 8) @ torch.ones(8, 8)
            trace.step()


def test_it_holds_the_steps_asked_for(tmp_path: Path) -> None:
    go(Trace(tmp_path, 3, 4, torch.device("cpu")), 20)
    assert [path.name for path in tmp_path.iterdir()] == ["trace-rank-3.json.gz"]
    assert steps_of(tmp_path / "trace-rank-3.json.gz") == [
        f"ProfilerStep#{WARM_UP + k}" for k in range(4)
    ]


def test_a_run_shorter_than_that_leaves_what_there_was(tmp_path: Path) -> None:
    go(Trace(tmp_path, 0, 50, torch.device("cpu")), WARM_UP + 3)
    assert len(steps_of(tmp_path / "trace-rank-0.json.gz")) >= 3


def test_none_asked_for_writes_none(tmp_path: Path) -> None:
    go(Trace(tmp_path, 0, 0, torch.device("cpu")), 5)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    with pytest.raises(OSError, match="No space left"):
        go(Trace(tmp_path, 0, 1, torch.device("cpu")), 6)
    assert not list(tmp_path.iterdir())
