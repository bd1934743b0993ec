"""Tune kNN or SASRec by validation, then score the best settings, and no others, on test.

    python benchmarks/tune_baselines.py data/beauty --system knn --tries 60 --json knn.json
    python benchmarks/tune_baselines.py data/beauty --system knn --json knn.json --finish

The first try has the default settings, the others are drawn at random, the same ones on every
machine. Every try is a row of the file as soon as it has ended, failures included. The same command
given again continues after the rows that are there; a training that was cut off continues from its
last epoch. Selection: NDCG@10 on validation over all users."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_dataset

from genrec_dist.baselines.run import run_baseline
from genrec_dist.bench.measure import table, write_table

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
Domain = tuple[str, list[float]]
SPACES: dict[str, dict[str, Domain]] = {
    "knn": {
        "window": ("choice", [1, 2, 3, 4, 6, 8, 12, 20, 50]),
        "backward": ("uniform", [0.0, 1.0]),
        "decay": ("uniform", [0.3, 1.0]),
        "recent": ("choice", [1, 2, 3, 5, 10, 20, 50]),
        "smoothing": ("loguniform", [0.03, 30.0]),
        "out_power": ("uniform", [0.0, 1.0]),
        "in_power": ("uniform", [0.0, 1.0]),
    },
    "sasrec": {
        "dropout": ("uniform", [0.3, 0.6]),
        "learning_rate": ("loguniform", [0.5e-3, 3e-3]),
        "batch_size": ("choice", [128, 256, 512]),
        "d_model": ("choice", [64, 128, 256]),
        "heads": ("choice", [1, 2, 4]),
        "label_smoothing": ("choice", [0.0, 0.1]),
        "average": ("choice", [0.0, 0.99, 0.995]),
        "layers": ("choice", [2, 3]),
    },
}


def draw(space: dict[str, Domain], number: int, seed: int) -> dict[str, float]:
    """The settings of try `number`; try 0 has the defaults.

    Numbers have four digits: what is written is what is used."""
    # Of Python's generator only `random` is promised to stay as it is.
    dice = random.Random(f"{seed} {number}")
    settings: dict[str, float] = {}
    for key, (kind, values) in space.items() if number else ():
        share, low, high = dice.random(), values[0], values[-1]
        if kind == "choice":
            settings[key] = values[int(share * len(values))]
        elif kind == "uniform":
            settings[key] = float(f"{low + share * (high - low):.4g}")
        else:
            settings[key] = float(f"{low * math.exp(share * math.log(high / low)):.4g}")
    return settings


def best(tries: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row of the highest score; raises SystemExit where no row has one."""
    scored = [row for row in tries if row["score"] is not None]
    if not scored:
        raise SystemExit("no try has ended well")
    return max(scored, key=lambda row: row["score"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune kNN or SASRec by validation.")
    parser.add_argument("data", type=Path, help="a directory of genrec prepare")
    parser.add_argument("--system", choices=tuple(SPACES), required=True)
    parser.add_argument("--json", type=Path, required=True, help="rows of all tries")
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--tries", type=int, default=120, help="how many settings at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--finish", action="store_true", help="score the best settings on test")
    parser.add_argument("--seeds", default="0", help="with --finish: SASRec's seeds, as 0,1,2")
    options = parser.parse_args()
    dataset, space = load_dataset(options.data), SPACES[options.system]
    search = {"system": options.system, "data": options.data.name, "seed": options.seed}
    search["space"] = {key: list(domain) for key, domain in space.items()}
    rows: dict[str, Any] = {"search": search, "tries": []}
    if options.json.is_file():
        held = json.loads(options.json.read_text(encoding="utf-8"))
        if held["search"] != search:
            raise SystemExit(f"{options.json}: holds another search: choose another --json")
        rows = {key: held[key] for key in ("search", "tries", "winner") if key in held}

    def score(split: str, number: int, settings: dict[str, float], seed: int = 0) -> dict[str, Any]:
        name = f"{options.data.name}-{options.system}-t{number:03}"
        run = options.runs / (f"{name}-seed{seed}" if seed else name)
        words = [f"{key}={value}" for key, value in settings.items()]
        words += [f"seed={seed}"] if seed else []
        return run_baseline(options.system, dataset, split, run, settings=words)  # type: ignore[arg-type]

    def save() -> None:
        write_table(table("baselines", [], **rows), options.json)

    tries = rows["tries"]
    while len(tries) < options.tries and not options.finish:
        number, start = len(tries), time.monotonic()
        row = {"number": number, "settings": draw(space, number, options.seed), "score": None}
        try:
            found = score("validation", number, row["settings"])
            row |= {
                "score": found["NDCG@10"],
                "validation": {name: found[name] for name in METRICS},
            }
            row["ended"] = "finished"
        except ValueError as error:  # a training that is not finite, say
            row["ended"] = str(error)
        tries.append({**row, "seconds": round(time.monotonic() - start, 1)})
        save()
        print(f"{number}: {row['score']} {row['settings']} {row['ended']}", flush=True)
    winner = best(tries)
    print(f"best: try {winner['number']}, {winner['validation']} {winner['settings']}")
    if options.finish:
        rows["winner"] = {key: winner[key] for key in ("number", "settings", "validation")}
        rows["winner"]["test"] = {}
        for seed in map(int, options.seeds.split(",") if options.system == "sasrec" else "0"):
            found = score("test", winner["number"], winner["settings"], seed)
            rows["winner"]["test"][str(seed)] = {name: found[name] for name in (*METRICS, "ci95")}
            save()
            print(f"test, seed {seed}: {rows['winner']['test'][str(seed)]}", flush=True)


if __name__ == "__main__":
    main()
