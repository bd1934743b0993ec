"""The server of `genrec serve` with Hugging Face's `generate` in place of our search: the peer of
`genrec bench serve`, run as `python -m genrec_dist.bench.peers.serve RUN QUEUE THREADS`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch

from genrec_dist.bench.peers.beam import (
    allowed_tokens,
    generated_lists,
    item_rows,
    make_generate,
)
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.decoding.searcher import TopItems, TrieSearcher
from genrec_dist.inference.load import LoadedRun, best_device, load_run
from genrec_dist.inference.recommend import Recommender
from genrec_dist.serving.listen import listen
from genrec_dist.serving.service import Service


class GenerateSearcher:
    """Answers a recommender's searches by `generate`, with the history in the lists. What may
    follow a prefix is worked out once."""

    def __init__(self, run: LoadedRun):
        self.device = run.searcher.device
        self._model, self._words = run.model, run.words
        self._after = allowed_tokens(run.words, int(run.model.config.eos_token_id))
        self._row_of = item_rows(run.words)

    def search(self, encoder: EncoderInput, *, beam: int, top: int, **_: Any) -> TopItems:
        generate = make_generate(self._model, self._words, encoder, max(beam, top), self._after)
        users = len(encoder.input_ids)
        lists = generated_lists(
            generate(output_scores=True), self._model, self._words, users, self._row_of
        )
        return TopItems(lists.items[:, :top], lists.scores[:, :top])


def generating(run: Path) -> Recommender:
    """A recommender whose lists `generate` makes."""
    loaded = load_run(run, best_device())
    recommender = Recommender(loaded, exclude_history=False)
    recommender.searcher = cast(TrieSearcher, GenerateSearcher(loaded))
    return recommender


def main(run: str, queue: str, threads: str) -> None:
    from genrec_dist.serving.app import Limits, make_app, run_server  # with FastAPI

    listener, limits = listen("127.0.0.1", 0), Limits()
    torch.set_num_threads(int(threads))
    service = Service(Path(run), generating, int(queue))
    at = f"http://127.0.0.1:{listener.getsockname()[1]}"
    run_server(make_app(service, token=None, limits=limits, at=at), listener, limits)


if __name__ == "__main__":
    main(*sys.argv[1:])
