"""Sweeps made by hand: an ordinary one with stopped and failed trials, its finals, and an awkward
one."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from genrec_tuning.record import Epoch, Final, Sweep, Trial, Value

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {},
    "last-biased": {"pretrain.mask.p": {"uniform": [0.2, 0.9]}},
    "recency": {"pretrain.mask.p": {"uniform": [0.2, 0.9]}},
    "span": {"pretrain.mask.k": {"int": [2, 6]}},
    "multi": {"pretrain.mask.k": {"int": [2, 6]}},
}
SPACE: dict[str, Any] = {
    "base": "tiny",
    "search": "optuna",
    "scheduler": "asha",
    "grace": 1,
    "reduction": 3,
    "trials": 24,
    "seed": 0,
    "space": {
        "finetune.learning_rate": {"loguniform": [3e-4, 1e-2]},
        "pretrain.mask.strategy": {"choice": STRATEGIES},
        "model.dropout": {"choice": [0.1, 0.2, 0.3]},
    },
}
GAIN = {"single": 0.0, "last-biased": 0.006, "recency": 0.007, "span": -0.003, "multi": 0.002}
PLANNED = 9


def epoch(number: int, score: float, loss: float = 4.0) -> Epoch:
    speed, seconds = 21_000.0 + number, 31.0 * number
    return Epoch(number, 100 * number, score, 1.7 * score, loss, loss - 0.2, speed, seconds)


def trial(number: int, scores: list[float], status: Any = "finished", **more: Any) -> Trial:
    """A trial whose epochs have these scores."""
    epochs = tuple(epoch(n, score, 5.2 - 30 * score) for n, score in enumerate(scores, start=1))
    id_ = f"t{number:04d}"
    facts = {
        "values": {},
        "seed": 0,
        "attempts": 1,
        "planned_epochs": PLANNED,
        "run": f"runs/{id_}",
    }
    return Trial(id=id_, status=status, epochs=epochs, **{**facts, **more})


def ordinary_sweep(num_trials: int = 24, seed: int = 3) -> Sweep:
    """Ordinary results: scores by a bell over the learning rate, losers stopped, too high a rate
    without a score."""
    dice, trials = random.Random(seed), []
    for number in range(num_trials):
        rate = math.exp(dice.uniform(math.log(3e-4), math.log(1e-2)))
        strategy = dice.choice(list(STRATEGIES))
        values: dict[str, Value] = {
            "finetune.learning_rate": rate,
            "pretrain.mask.strategy": strategy,
        }
        if strategy in ("last-biased", "recency"):
            values["pretrain.mask.p"] = dice.uniform(0.2, 0.9)
        if strategy in ("span", "multi"):
            values["pretrain.mask.k"] = dice.randint(2, 6)
        values["model.dropout"] = dice.choice([0.1, 0.2, 0.3])
        bell = math.exp(-(math.log(rate / 1.5e-3) ** 2) / 2.5)
        peak = 0.05 * bell + GAIN[strategy] + dice.gauss(0, 0.002)
        more: dict[str, Any] = {"values": values, "seed": number}
        if rate > 7.5e-3:
            reason = "loss is NaN at step 120 of finetune"
            trials.append(trial(number, [], "failed", reason=reason, **more))
            continue
        run = PLANNED if peak > 0.047 else 3 if peak > 0.035 else 1
        scores = [peak * (1 - math.exp(-e / 2.2)) + dice.gauss(0, 6e-4) for e in range(1, run + 1)]
        status = "finished" if run == PLANNED else "stopped"
        trials.append(trial(number, [max(0.0, one) for one in scores], status, **more))
    return Sweep("beauty", SPACE, tuple(trials), started=1_790_000_000.0, hours=2.3, resumed=1)


def with_finals(sweep: Sweep) -> Sweep:
    """Three trials and the base recipe with three seeds; the winner is better than the base on
    test."""
    test = {"HR@5": 0.0541, "NDCG@5": 0.0397, "HR@10": 0.0788, "NDCG@10": 0.0476}
    finals = []
    for system, mean in (("t0011", 0.0561), ("t0015", 0.0566), ("t0018", 0.0533), ("base", 0.0501)):
        for seed in range(3):
            tested = system in ("t0015", "base")
            seen = {key: value + 0.0003 * seed for key, value in test.items()} if tested else None
            run = f"finals/{system}/seed-{seed}"
            finals.append(Final(system, seed, run, "finished", mean + 0.0004 * seed, seen))
    row = {"a": 0.0479, "b": 0.0451, "difference": 0.0028, "ci95": [0.0009, 0.0047]}
    row |= {"p": 0.0021, "p_holm": 0.0063}
    metrics = {"HR@10": row, "NDCG@10": row}
    comparison = {"split": "test", "metrics": metrics, "verdict": "A is better in NDCG@10."}
    return dataclasses.replace(sweep, finals=tuple(finals), winner="t0015", comparison=comparison)


def awkward_sweep(evil: str) -> Sweep:
    """Sixty trials of fourteen keys and long names; `evil` is wherever a text can be."""
    dice = random.Random(1)
    names = [evil, "a choice with a name that is far too long for any axis", *"cdefg"]
    keys: dict[str, Any] = {
        f"optimizer.a_long_name_{n}": {"uniform": [0.0, 1e6]} for n in range(11)
    }
    keys |= {evil: {"choice": names}, "finetune.learning_rate": {"loguniform": [1e-7, 10.0]}}
    keys |= {"pretrain.mask.k": {"int": [3, 4]}}
    trials = []
    for number in range(60):
        values: dict[str, Value] = {key: dice.uniform(0, 1e6) for key in keys if "optimizer" in key}
        values |= {evil: dice.choice(names), "finetune.learning_rate": 10 ** dice.uniform(-7, 1)}
        values |= {"pretrain.mask.k": dice.choice([3, 4])} if number % 3 else {}
        status = ("finished", "stopped", "failed", "interrupted", "running")[number % 5]
        scores = [dice.uniform(0.04, 0.0401) for _ in range(1 + number % 3)]
        more = {"values": values, "planned_epochs": 120, "reason": evil}
        trials.append(trial(number, [] if status == "failed" else scores, status, **more))
    space = {"base": evil, "set": {evil: evil}, "search": evil, "scheduler": evil, "space": keys}
    finals = (Final(evil, 0, evil, "finished", 0.04), Final("t0000", 0, "", "failed"))
    comparison = {"metrics": {evil: {"a": evil}}, "verdict": evil}
    sweep = Sweep(evil, space, tuple(trials), started=1.79e9, hours=30.0, finals=finals)
    return dataclasses.replace(sweep, winner=evil, comparison=comparison)
