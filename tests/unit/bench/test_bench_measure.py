"""Claims, turns and the training that is watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from genrec_shards.storage.write import write_shards

from genrec_dist.bench.measure import each_in_turn, in_turn, make_claim, processor_seconds
from genrec_dist.bench.stream import Sizes, measure_waiting
from genrec_dist.bench.synthetic import make_data


@pytest.mark.parametrize(
    ("ours", "theirs", "unit", "goal", "ratio", "holds"),
    [
        (2.0, 6.0, "ms", ">= 3x", 3.0, True),
        (2.0, 6.0, "ms", ">= 3.1x", 3.0, False),
        (6.0, 2.0, "samples/s", ">= 3x", 3.0, True),
        (2.0, 6.0, "samples/s", ">= 1x", 1 / 3, False),
        (3.0, 2.0, "B", "<= 1.5x in two epochs", 1.5, True),
        (3.0, 2.0, "s", "<= 1.4x", 1.5, False),
        (2.0, 2.0, "calls/s", "> 1x", 1.0, False),
        (1.0, 4.0, "real tokens/s", "none", 0.25, True),
    ],
)
def test_claim_has_ratio_and_verdict_of_its_goal(
    ours: float, theirs: float, unit: str, goal: str, ratio: float, holds: bool
) -> None:
    claim = make_claim("x", "peer", ours, theirs, unit, goal)
    assert claim.ratio == pytest.approx(ratio)
    assert claim.holds == holds


@pytest.mark.parametrize("warm_up", [True, False])
def test_rivals_alternate_after_a_round_to_warm_up(warm_up: bool) -> None:
    calls: list[str] = []
    rivals: dict[str, Callable[[], object]] = {name: partial(calls.append, name) for name in "ab"}
    seconds = in_turn(rivals, 3, warm_up)
    assert calls == ["a", "b"] * (3 + warm_up)
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_rivals_are_timed_by_the_clock_that_is_given() -> None:
    ticks = iter([0.0, 1.0, 5.0, 8.0, 10.0, 12.0, 20.0, 24.0])
    seconds = in_turn({"a": lambda: None, "b": lambda: None}, 2, False, ticks.__next__)
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    before = processor_seconds()
    time.sleep(0.2)
    assert processor_seconds() - before < 0.1


def test_inputs_come_round_and_round() -> None:
    seen: list[int] = []
    step = each_in_turn(seen.append, [1, 2, 3])
    for _ in range(5):
        step()
    assert seen == [1, 2, 3, 1, 2]


@pytest.mark.dist
@pytest.mark.ranks
def test_watched_training_is_ended_and_one_that_cannot_start_gives_its_reason(
    tmp_path: Path,
) -> None:
    dataset = make_data(tmp_path / "made", 400, 60)
    sizes = Sizes(train_steps=6)
    with pytest.raises(ValueError, match=r"took too few steps: .*shards"):
        measure_waiting(dataset, tmp_path, sizes)
    write_shards(dataset, tmp_path / "shards")
    (claim,), more = measure_waiting(dataset, tmp_path, sizes)
    # It is stopped after six steps, of which the first three are left out.
    assert len(more["shares"]) >= 3
    assert claim.ours == pytest.approx(sum(more["shares"]) / len(more["shares"]))
    assert 0 <= claim.ours <= 1
    assert "stopped" in (tmp_path / "run" / "status.json").read_text(encoding="utf-8")
