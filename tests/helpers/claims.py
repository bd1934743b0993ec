"""What every benchmark's claims have to fulfil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genrec_dist.bench.measure import Claim, format_claims, write_table


def check_claims(claims: list[Claim], table: dict[str, Any], path: Path) -> None:
    """Each claim follows from its own numbers, and the table is written with all of them."""
    write_table(table, path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["claims"] == [vars(claim) for claim in claims]
    assert {"name", "date", "hardware", "versions", "git"} <= set(written)
    assert len({(claim.id, claim.peer) for claim in claims}) == len(claims)
    lines = format_claims(claims).splitlines()
    for claim, line in zip(claims, lines[1:], strict=True):
        assert line.startswith(claim.id)
        assert line.endswith("holds" if claim.holds else "FAILS")
        shown, inverse = claim.ours / claim.theirs, claim.theirs / claim.ours
        upper = claim.goal.startswith("<=")
        ours_over_theirs = upper or claim.unit.endswith("/s")
        assert claim.ratio == pytest.approx(shown if ours_over_theirs else inverse)
        if claim.goal != "none":
            bound = float(claim.goal.split()[1].removesuffix("x"))
            assert claim.holds == (claim.ratio <= bound if upper else claim.ratio >= bound)
