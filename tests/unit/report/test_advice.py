"""What a run is told about itself: it ended early, or a rule that learns nothing is above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genrec_dist.report.advice import advice
from genrec_dist.report.run_files import RunFiles


def run_of(scores: list[float], epochs: int = 3, decode: str = "exact", **more: Any) -> RunFiles:
    events = [
        {"event": "validation", "stage": "finetune", "epoch": n, "step": n + 1, "NDCG@10": score}
        for n, score in enumerate(scores)
    ]
    recipe = {"finetune": {"epochs": epochs}, "decode": decode}
    return RunFiles(Path("run"), recipe=recipe, events=[*events, *more.pop("events", [])], **more)


@pytest.mark.parametrize(
    ("scores", "epochs", "rises"),
    [
        ([0.01, 0.02, 0.03], 3, True),
        ([0.01, 0.03, 0.02], 3, False),
        ([0.03, 0.01, 0.02], 3, False),
        ([0.01, 0.02], 3, False),  # it was stopped early
        ([0.02], 1, False),  # nothing to compare with
        ([0.02, 0.02], 2, False),
    ],
)
def test_a_run_whose_last_epoch_was_its_best_is_told_to_go_on(
    scores: list[float], epochs: int, rises: bool
) -> None:
    lines = advice(run_of(scores, epochs))
    expected = (
        "Validation NDCG@10 still rose in the last epoch (.0200 to .0300): train longer, into "
        "another run directory: --set finetune.epochs=6"
    )
    assert lines == ([expected] if rises else [])


def judged(ours: float, **rules: float) -> dict[str, Any]:
    return {"event": "judgement", "NDCG@10": ours, "beside": rules}


def test_a_rule_above_the_model_is_named_with_what_to_try() -> None:
    events = [judged(0.04, knn=0.05, popularity=0.01)]
    (line,) = advice(run_of([], events=events))
    assert line.startswith(
        "Co-occurrence kNN, which learns nothing, is above this model on validation (NDCG@10 .0500 "
        "to .0400): try `genrec train auto`"
    )
    (line,) = advice(run_of([], decode="hybrid", events=[judged(0.01, repeat=0.02, knn=0.015)]))
    assert line.startswith("Listing the user's recent items again, which learns nothing")
    assert "train longer, or list by the rule" in line
    assert advice(run_of([], events=[judged(0.05, knn=0.05)])) == []


@pytest.mark.parametrize(
    ("losses", "by_heart"),
    [([6.0, 7.5, 10.0], True), ([8.0, 6.0, 6.2], False), ([8.0, 7.0, 6.0], False)],
)
def test_who_learned_by_heart_is_not_told_to_train_longer(
    losses: list[float], by_heart: bool
) -> None:
    run = run_of([0.01] * 3, decode="hybrid", events=[judged(0.01, knn=0.02)])
    for line, loss in zip(run.stage("validation", "finetune"), losses, strict=True):
        line["loss"] = loss
    (line,) = advice(run)
    assert ("validation loss 6.00, later 10.00" in line) == by_heart
    assert ("train longer" in line) == (not by_heart)


def test_an_evaluation_speaks_before_the_validation_of_training() -> None:
    test = {"system": "genrec", "NDCG@10": 0.03, "beside": {"knn": {"NDCG@10": 0.02}}}
    run = run_of([], events=[judged(0.04, knn=0.05)], metrics={"test": test})
    assert advice(run) == []
    test["beside"]["counting"] = None
    test["beside"]["popularity"] = {"NDCG@10": 0.031}
    (line,) = advice(run)
    assert line.startswith("Popularity, which learns nothing, is above this model on test")
    assert "`--decode hybrid`" in line
    test["protocol"] = {"decode": "hybrid"}  # another mode than the recipe's
    (line,) = advice(run)
    assert "`--decode hybrid`" not in line
    test["system"] = "knn"
    assert advice(run) == []
