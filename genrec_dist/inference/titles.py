"""Recommendations for a person to read: the items' titles beside their ids, and the end of the
prompt where the model reads one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from genrec_shards.dataset import Dataset

from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.layout import PromptLayout
from genrec_dist.inference.item_filter import find_rows
from genrec_dist.inference.load import LoadedRun
from genrec_dist.inference.recommend import Recommendation, Request

LATEST = 5
"""Items of the history that are shown."""
LONGEST = 80
"""Characters of a title that are shown."""
PROMPT_LINES = 8
"""Lines of the prompt that are shown, from its end."""


class Titles:
    """Titles of the items of a catalogue."""

    def __init__(self, of_item: dict[str, str], run: LoadedRun | None = None) -> None:
        """Take titles by item id, and the run whose prompts are shown; None: histories are."""
        self.of_item, self.run = of_item, run

    @classmethod
    def of_data(cls, dataset: Dataset) -> Titles:
        """The titles of a data directory, or where the table had no column of them the items'
        texts. Raises ValueError where the data has neither."""
        described = dataset.descriptions
        if described is None:
            info = dataset.info
            raise ValueError(
                f"{dataset.path}: its items have no titles: make it once more with "
                f"`genrec prepare {dataset.path} --out NEW --items META "
                f"--numbering {info.numbering} --seed {info.seed}` and give --data NEW"
            )
        titles = described.titles or described.texts
        return cls(dict(zip(dataset.sequences.item_ids, titles, strict=True)))

    @classmethod
    def of_prompts(cls, run: LoadedRun) -> Titles:
        """The titles that a model with a prompt reads and writes."""
        assert run.searcher.texts is not None
        titles = run.searcher.texts.item_codes
        return cls(dict(zip(run.catalogue.item_ids, titles, strict=True)), run)

    def of(self, item: str) -> str:
        """One line; says so where the item has none."""
        title = " ".join(self.of_item.get(item, "").split())
        if not title:
            return "(no title)" if item in self.of_item else "(not in the catalogue)"
        return title if len(title) <= LONGEST else title[: LONGEST - 3] + "..."

    def page(self, request: Request, answer: Recommendation) -> str:
        """Who, what they took last or the prompt's end, and the list: place, probability, id and
        title on a line."""
        history = list(request.history)
        whose = "a history" if request.user is None else f"user {request.user}"
        lines = [f"{whose} of {len(history)} item{'s' * (len(history) != 1)}"]
        if self.run is not None:
            lines += ["the end of the prompt:", *_last_lines(prompt_of(self.run, history))]
        width = max(map(len, [*history[-LATEST:], *answer.items]), default=0)
        if self.run is None:
            if len(history) > LATEST:
                lines.append(f"{'...':>14}")
            lines += [f"{'':14}  {item:<{width}}  {self.of(item)}" for item in history[-LATEST:]]
        for place, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), 1):
            lines.append(f"{place:4}  {math.exp(score):8.5f}  {item:<{width}}  {self.of(item)}")
        return "\n".join(lines) + "\n"


def prompt_of(run: LoadedRun, history: Sequence[str]) -> str:
    """The text that a model with a prompt continues after a history of item ids: as it is read,
    with the titles that fit, read back from its tokens."""
    assert isinstance(run.layout, PromptLayout)
    rows, _ = find_rows(run.catalogue, history)
    encoder = encode_histories(rows, np.array([0, len(rows)]), np.array([-1]), run.layout)
    tokens = [*encoder.input_ids[0].tolist(), *run.layout.tail.tolist()]
    text: str = run.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _last_lines(prompt: str) -> list[str]:
    lines = prompt.rstrip("\n").split("\n")
    cut = ["..."] if len(lines) > PROMPT_LINES else []
    return [f"    | {line}" for line in cut + lines[-PROMPT_LINES:]]
