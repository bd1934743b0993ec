"""`micro_batch_tokens: auto` on real ranks: one number for all, that of the smallest card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import HELPERS
from two_ranks import run_ranks

SCRIPT = HELPERS / "free_memory_rank.py"


@pytest.mark.dist
def test_ranks_agree_on_the_number_of_the_smallest_card(tiny_recipe: Path) -> None:
    text = tiny_recipe.read_text().replace("micro_batch_tokens: 2048", "micro_batch_tokens: auto")
    tiny_recipe.write_text(text.replace("batch_size: 40", "batch_size: 60000"))
    folder = tiny_recipe.parent
    pairs = ["40,2.1", "2.1,2.1", "40,40", "40,1.2"]
    ended = run_ranks([SCRIPT, tiny_recipe, folder, *pairs], folder / "logs")
    assert ended.returncode == 0, ended.stderr
    found, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert found == other
    uneven, even, large, (_, error) = found
    assert uneven == even
    assert "as many as fit; 2.1 GiB are free on the smallest card" in uneven[1]
    assert large[0] > uneven[0]
    assert "of 1.2 GiB that are free on the smallest card 0.0 may be used" in error
    assert "\n" not in error
