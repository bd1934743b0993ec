"""What a beam loses against scoring the whole catalogue."""

# U users, N list

from __future__ import annotations

import time
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import Split

from genrec_dist.beam import Mode
from genrec_dist.metrics import TOP, metrics_from_histogram, rank_histogram, target_ranks
from genrec_dist.results import sample_users
from genrec_dist.run import LoadedRun
from genrec_dist.text import encode_histories, ragged

BEAMS = (20, 50)
USERS_AT_ONCE = 50


def search_error(
    run: LoadedRun,
    dataset: Dataset,
    *,
    split: Split = "test",
    num_users: int = 1000,
    seed: int = 0,
    beams: tuple[int, ...] = BEAMS,
) -> dict[str, Any]:
    """`{"all": {...}, "beam 20": {...}, ...}` on a seeded sample of users, the history excluded.

    Each: metrics, seconds, and for beams `NDCG@10 lost` (all minus beam), `same top 10` (share of users whose first ten
    are those of `all`, in order) and `missed` (share of the oracle's first ten that the beam's twenty lack).
    """
    view = dataset.sequences.history_and_target(split)
    users_U = view.users[sample_users(len(view.users), num_users, seed)]
    oracle, seconds = _lists(run, view, users_U, beam=TOP, mode="all")
    found: dict[str, Any] = {"all": {**_scores(oracle, view.targets[users_U]), "seconds": seconds}}
    for beam in beams:
        lists, seconds = _lists(run, view, users_U, beam=beam, mode="exact")
        scores = _scores(lists, view.targets[users_U])
        found[f"beam {beam}"] = {
            **scores,
            "NDCG@10 lost": found["all"]["NDCG@10"] - scores["NDCG@10"],
            "same top 10": float((lists[:, :10] == oracle[:, :10]).all(1).mean()),
            "missed": float(1 - (oracle[:, :10, None] == lists[:, None]).any(2).mean()),
            "seconds": seconds,
        }
    return {"users": len(users_U), "split": split, **found}


def _lists(run: LoadedRun, view: Any, users_U: np.ndarray, *, beam: int, mode: Mode) -> tuple[np.ndarray, float]:
    lengths_U = (view.ends - view.starts)[users_U]
    items_UN = np.empty((len(users_U), TOP), np.int32)
    order = np.argsort(lengths_U, kind="stable")
    start = time.perf_counter()
    for first in range(0, len(order), USERS_AT_ONCE):
        places = order[first : first + USERS_AT_ONCE]
        flat, offsets = ragged(view.starts[users_U[places]], lengths_U[places])
        encoder = encode_histories(view.items[flat], offsets, users_U[places], run.layout).to(run.searcher.device)
        excluded = (np.repeat(np.arange(len(places)), lengths_U[places]), view.items[flat])
        items_UN[places] = run.searcher.search(encoder, beam=beam, top=TOP, mode=mode, excluded=excluded).items
    return items_UN, time.perf_counter() - start


def _scores(items_UN: np.ndarray, targets_U: np.ndarray) -> dict[str, float]:
    metrics = metrics_from_histogram(rank_histogram(target_ranks(items_UN, targets_U)))
    return {name: metrics[name] for name in ("HR@10", "NDCG@10")}
