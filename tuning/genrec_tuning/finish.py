"""The finals of a sweep: its best trials with fresh seeds, and then, once, test."""

from __future__ import annotations

from pathlib import Path

from genrec_tuning.record import Sweep


def finish_sweep(
    out: str | Path,
    *,
    against_base: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    raise ValueError("not yet")
