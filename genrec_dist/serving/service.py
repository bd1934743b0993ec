"""The model that answers, the threads that wait for it, and the change to another model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from genrec_shards.storage.manifest import file_sha256

from genrec_dist.config.hub import run_folder
from genrec_dist.config.model_manifest import MANIFEST
from genrec_dist.config.paths import best_folder
from genrec_dist.inference.recommend import Recommendation, Recommender, Request
from genrec_dist.serving.metrics import Metrics


class QueueFull(Exception):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class Model:
    recommender: Recommender
    run: Path
    digest: str
    """The first digits of the sha256 of the model's manifest; empty for models without one."""


class Service:
    """Answers requests with one model, and changes to another without losing any.

    Each request has a thread of its own until it is answered, so those that come while a batch is
    decoded share the next one (`inference/request_batching.py`).
    """

    def __init__(self, run: Path, load: Callable[[Path], Recommender], queue: int):
        """Load the first model.

        Args:
            run: Run directory of `genrec train`.
            load: Makes a recommender of a run directory.
            queue: Requests that may wait or be decoded at the same time.

        Raises:
            ValueError, OSError: What `load` raises.
        """
        self._load, self._queue = load, queue
        self._pool = ThreadPoolExecutor(queue, "recommend")
        self._reloading = asyncio.Lock()
        self.in_flight = 0
        self.metrics = Metrics()
        self.model = self._open(run)

    def _open(self, run: Path) -> Model:
        run = run_folder(run)
        recommender = self._load(run)
        recommender.recommend([[]])  # what cannot answer does not replace what can
        manifest = best_folder(run) / MANIFEST
        digest = file_sha256(manifest)[:12] if manifest.is_file() else ""
        return Model(recommender, run, digest)

    async def recommend(
        self, requests: Sequence[Request], k: int
    ) -> tuple[Model, list[Recommendation]]:
        """The model that answered, and its answers in the order of the requests. Raises QueueFull
        where nothing was begun."""
        if self.in_flight >= self._queue:
            raise QueueFull
        model = self.model  # the one that answers, though another may come meanwhile
        self.in_flight += 1
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._pool, model.recommender.recommend, requests, k
            )
        finally:
            self.in_flight -= 1
        self.metrics.histories += len(requests)
        self.metrics.unknown_items += sum(len(answer.unknown_items) for answer in answers)
        return model, answers

    async def reload(self, run: Path | None = None) -> Model:
        """Load a run directory, and answer with it from then on. `run`: None: the one that answers
        now, which may hold newer weights. Raises ValueError, OSError where the model cannot be
        loaded; the old one goes on answering."""
        async with self._reloading:
            try:
                model = await asyncio.to_thread(self._open, run or self.model.run)
            except Exception:
                self.metrics.reloads["failed"] += 1
                raise
            self.model = model
            self.metrics.reloads["ok"] += 1
            return model
