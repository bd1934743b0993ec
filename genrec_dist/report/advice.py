"""What a person should know of a run beside its figures: it ended early, it learned by heart, or a
rule that learns nothing is above it; and what to do then."""

from __future__ import annotations

from typing import Any

from genrec_dist.report.run_files import RunFiles, is_number
from genrec_dist.report.svg import score

RULES = {
    "knn": "Co-occurrence kNN",
    "popularity": "Popularity",
    "repeat": "Listing the user's recent items again",
}
NDCG = "NDCG@10"
BY_HEART = 1.1
"""From the lowest validation loss to the last one: above this the training parts are learned by
heart."""


def advice(run: RunFiles) -> list[str]:
    """Sentences for the terminal and the report; none where nothing is to be said."""
    return [line for line in (_still_rising(run), _beaten(run)) if line]


def _still_rising(run: RunFiles) -> str:
    """Where the last planned epoch was the best one."""
    validations = _validations(run, NDCG)
    epochs = (run.recipe.get("finetune") or {}).get("epochs")
    if len(validations) < 2 or not is_number(epochs):
        return ""
    last, scores = validations[-1], [float(line[NDCG]) for line in validations]
    if last.get("epoch") != epochs - 1 or scores[-1] <= max(scores[:-1]):
        return ""
    return (
        f"Validation {NDCG} still rose in the last epoch ({score(scores[-2])} to "
        f"{score(scores[-1])}): train longer, into another run directory: "
        f"--set finetune.epochs={2 * int(epochs)}"
    )


def _validations(run: RunFiles, key: str) -> list[dict[str, Any]]:
    return [line for line in run.stage("validation", "finetune") if is_number(line.get(key))]


def _beaten(run: RunFiles) -> str:
    """Where a rule that learns nothing is above the model: by the last evaluation, else by the
    validation at the end of training."""
    known: dict[str, Any]
    mode = run.recipe.get("decode")
    if run.metrics:
        split, metrics = next(iter(run.metrics.items()))
        if not str(metrics.get("system", "")).startswith("genrec"):
            return ""
        mode = (metrics.get("protocol") or {}).get("decode", mode)
        ours, rules = metrics.get(NDCG), metrics.get("beside") or {}
        known = {name: (rules.get(name) or {}).get(NDCG) for name in RULES}
    else:
        judged = (run.of("judgement") or [{}])[-1]
        split, ours, known = "validation", judged.get(NDCG), judged.get("beside") or {}
    above = {name: value for name, value in known.items() if name in RULES and is_number(value)}
    if not above or not is_number(ours) or max(above.values()) <= ours:
        return ""
    best = max(above, key=above.__getitem__)
    return (
        f"{RULES[best]}, which learns nothing, is above this model on {split} "
        f"({NDCG} {score(above[best])} to {score(ours)}): {_remedy(run, mode)}"
    )


def _remedy(run: RunFiles, mode: Any) -> str:
    if mode != "hybrid":
        return (
            "try `genrec train auto`, whose steps fit the data, or `--decode hybrid`, which takes "
            "the rule in"
        )
    losses = [float(line["loss"]) for line in _validations(run, "loss")]
    if losses and losses[-1] > BY_HEART * min(losses):
        return (
            f"the model learned the training parts by heart (validation loss {min(losses):.2f}, "
            f"later {losses[-1]:.2f}), so longer training will not help: bring more data, or list "
            "by the rule"
        )
    return "the data may be too few to learn from: train longer, or list by the rule"
