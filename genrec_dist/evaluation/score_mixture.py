"""What `hybrid` mixes and by which weights: chosen on validation, kept beside the run, used for
test."""

# G mixtures of a grid

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.atomic import write_json
from genrec_shards.readers.documents import read_object

from genrec_dist.config.load import section_from
from genrec_dist.data.item_graph import MOST_RECENT, KnnSettings, knn_settings
from genrec_dist.data.repeat_model import RepeatModel
from genrec_dist.evaluation.metrics import METRICS, as_written, metrics_from_histogram

FILE = "hybrid.json"
TEXTS = "texts_hash"
"""Of a mixture's origin: the items' texts, there only where they have any."""
ITEM_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GRAPH_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
EPSILONS = (0.1, 0.5, 0.9, 0.98, 0.995, 0.999)
REPEAT_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
TEXT_WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 3.0)
TEXT_EPSILONS = (0.1, 0.5, 0.9, 0.98, 0.995)


@dataclass(frozen=True)
class TextTerm:
    """weight log((1 - epsilon) share + epsilon / N): what the items' texts add to a score."""

    weight: float = 0.0
    epsilon: float = 0.1
    """How much of the distribution is uniform."""
    source: str = "words"
    """Whose cosine is taken: `words`, TF-IDF of the words, or a source of `item_vectors`."""
    recent: int = 8
    """How many items at the end of the history count."""
    decay: float = 0.6
    """Weight of the history's items: decay^age, age 0 being the last item."""
    power: float = 3.0
    """Of the cosine, whose part in the sum over all items is the share."""

    def __post_init__(self) -> None:
        for name in ("weight", "decay", "power"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"text {name} is {getattr(self, name)}: it has to be 0 or above")
        if not 1 <= self.recent <= MOST_RECENT:
            raise ValueError(
                f"text recent is {self.recent}: it has to be from 1 to {MOST_RECENT:,}"
            )
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"text epsilon is {self.epsilon}: it has to be above 0, at most 1")


@dataclass(frozen=True)
class Mixture:
    """score = log p + item_weight log p_item + graph_weight log((1 - epsilon) share + epsilon / N)
    + repeat_weight log p_repeat + the text term


    log p: of GenRec's decoder; of SASRec's softmax in its control. p_item: the item head's, where
    there is one. share: the item's part of the kNN scores (`Graph.probabilities`), of new items
    alone where there is a repeat model. N: size of the catalogue. p_repeat:
    `RepeatModel.probabilities`."""

    item_weight: float = 1.0
    graph_weight: float = 0.0
    epsilon: float = 0.1
    """How much of the graph's distribution is uniform."""
    graph: KnnSettings = field(default_factory=KnnSettings)
    repeat_weight: float = 0.0
    repeat: RepeatModel | None = None
    """None where the history is left out of the lists, or no training part repeats an item."""
    text: TextTerm | None = None
    """None where the items have no texts, or these do not help."""

    def __post_init__(self) -> None:
        for name in ("item_weight", "graph_weight", "repeat_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be 0 or above")
        if self.repeat_weight and self.repeat is None:
            raise ValueError(
                f"repeat_weight is {self.repeat_weight}, and there is no repeat model: set it to 0"
            )
        if not 0 < self.epsilon <= 1:
            raise ValueError(
                f"epsilon is {self.epsilon}: it has to be above 0, or no weight makes a number of "
                "log 0, and at most 1"
            )

    @property
    def of_graph(self) -> dict[str, Any] | None:
        """What the protocol says of the parts that are known from the history; None where none has
        a weight."""
        if not self.graph_weight and not self.repeat_weight and self.text is None:
            return None
        return {
            "weight": self.graph_weight,
            "epsilon": self.epsilon,
            **dataclasses.asdict(self.graph),
            **({"repeat_weight": self.repeat_weight} if self.repeat_weight else {}),
            **({"text": dataclasses.asdict(self.text)} if self.text else {}),
        }


def grid(
    item_weights: Sequence[float], graph: KnnSettings, repeat: RepeatModel | None = None
) -> list[Mixture]:
    """All that is tried, the lighter weights first; without a graph's weight its epsilon does not
    matter."""
    return [
        Mixture(item_weight, graph_weight, epsilon, graph, repeat_weight, repeat)
        for repeat_weight in (REPEAT_WEIGHTS if repeat is not None else REPEAT_WEIGHTS[:1])
        for item_weight in item_weights
        for graph_weight in GRAPH_WEIGHTS
        for epsilon in (EPSILONS if graph_weight else EPSILONS[:1])
    ]


def text_grid(
    best: Mixture, term: TextTerm, graph_weights: Sequence[float] | None = None
) -> list[Mixture]:
    """The best mixture without texts and, after it, what a text term of every weight and epsilon
    makes of it, with these graph weights (None: its own and those next to it).

    A text takes over some of what the graph said alone; the other parts stay as they are."""
    if graph_weights is None:
        place = GRAPH_WEIGHTS.index(best.graph_weight)
        graph_weights = GRAPH_WEIGHTS[max(place - 1, 0) : place + 2]
    terms = [
        dataclasses.replace(term, weight=weight, epsilon=epsilon)
        for weight in TEXT_WEIGHTS
        for epsilon in TEXT_EPSILONS
    ]
    return [best] + [
        dataclasses.replace(best, graph_weight=graph_weight, text=term)
        for term in terms
        for graph_weight in graph_weights
    ]


@dataclass(frozen=True)
class Choice:
    """The best of a grid by NDCG@10 on validation; of equal ones the first."""

    mixture: Mixture
    validation: dict[str, float]
    users: int
    table: list[tuple[float, float, float, float, float]]
    """(item_weight, graph_weight, epsilon, repeat_weight, NDCG@10) of all that was tried without
    texts."""
    text_table: list[tuple[float, float, float, float]] = field(default_factory=list)
    """(graph_weight, text weight, text epsilon, NDCG@10) of what was tried with them."""

    def __str__(self) -> str:
        """A line a user may read."""
        mixed = self.mixture
        figures = ", ".join(f"{name} {as_written(self.validation[name])}" for name in METRICS)
        parts = f", repeat_weight {mixed.repeat_weight}" if mixed.repeat else ""
        if (text := mixed.text) is not None:
            parts += f", text weight {text.weight} of {text.source}, its epsilon {text.epsilon}"
        elif self.text_table:
            parts += ", no text, which did not help"
        return (
            f"of {len(self.table) + len(self.text_table)} mixtures: item_weight "
            f"{mixed.item_weight}, graph_weight {mixed.graph_weight}, epsilon {mixed.epsilon}"
            f"{parts}; validation {figures}"
        )


def choose(tried: Sequence[Mixture], histograms_G: np.ndarray) -> Choice:
    """`histograms_G`: int64 [G, 21] as `rank_histogram`, of the validation targets under each
    mixture."""
    metrics = [metrics_from_histogram(histogram) for histogram in histograms_G]
    table = [
        (
            mixed.item_weight,
            mixed.graph_weight,
            mixed.epsilon,
            mixed.repeat_weight,
            found["NDCG@10"],
        )
        for mixed, found in zip(tried, metrics, strict=True)
    ]
    best = int(np.argmax([row[-1] for row in table]))
    return Choice(
        tried[best],
        {name: metrics[best][name] for name in METRICS},
        int(histograms_G[best].sum()),
        table,
    )


def choose_with_text(before: Choice, tried: Sequence[Mixture], histograms_G: np.ndarray) -> Choice:
    """The best of a `text_grid`; arguments as of `choose`, `before` chosen without texts."""
    found = choose(tried, histograms_G)
    rows = [
        (mixed.graph_weight, mixed.text.weight, mixed.text.epsilon, row[-1])
        for row, mixed in zip(found.table, tried, strict=True)
        if mixed.text is not None
    ]
    return dataclasses.replace(found, table=before.table, text_table=rows)


def changed(
    mixture: Mixture,
    item_weight: float | None,
    graph_weight: float | None,
    overrides: Sequence[str] | None,
) -> Mixture:
    """Another mixture where something is given; `overrides`: `epsilon=value`, `text.key=value` of
    `TextTerm`, or `key=value` of `KnnSettings`."""
    held = dataclasses.asdict(mixture)
    of_mixture = [text for text in overrides or [] if text.startswith("epsilon=")]
    of_text = [text for text in overrides or [] if text.startswith("text.")]
    of_graph = [text for text in overrides or [] if text not in (*of_mixture, *of_text)]
    if of_text:
        keys = [text.removeprefix("text.") for text in of_text]
        term = section_from(TextTerm, dict(held["text"] or {}), keys, "text")
        held["text"] = dataclasses.asdict(term)
    held["graph"] = dataclasses.asdict(knn_settings(of_graph, held["graph"], ["epsilon"]))
    for name, value in (("item_weight", item_weight), ("graph_weight", graph_weight)):
        held[name] = held[name] if value is None else value
    return section_from(Mixture, held, of_mixture, "hybrid")


def save(choice: Choice, run: Path, origin: dict[str, Any]) -> Path:
    """`origin`: what the weights are good for: `load` is given the same."""
    path = run / FILE
    values = dataclasses.asdict(choice)
    if not choice.text_table:
        del values["text_table"], values["mixture"]["text"]
    write_json(path, {"origin": origin, **values})
    return path


def load(run: Path, origin: dict[str, Any]) -> Mixture | None:
    """The mixture that was chosen for a run; None where none was. Raises ValueError for a damaged
    file, and for one of another origin; of other texts only where the mixture takes them."""
    path = run / FILE
    if not path.is_file():
        return None
    remedy = "remove it and choose the weights again"
    held = read_object(path, "readable", remedy)
    try:
        found, mixture = dict(held["origin"]), section_from(Mixture, held["mixture"], None, FILE)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}): {remedy}") from None
    for key, value in origin.items():
        if key == TEXTS and mixture.text is None:
            continue
        if found.get(key) != value:
            raise ValueError(
                f"{path}: weights chosen for {key} {found.get(key)}, not {value}: {remedy}"
            )
    return mixture
