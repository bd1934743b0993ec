"""Nearness of texts as a distribution, against the formula in plain Python, and its settings."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare

from genrec_dist.evaluation.score_mixture import TextTerm
from genrec_dist.text.similarity import TextSimilarity
from genrec_dist.text.tune import HISTORIES, POWERS, tune_text

NUM_ITEMS, TOPICS = 60, 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Item i is of topic i % 10, and its words say so; a user walks through one topic, so that the
    last items' texts tell the next one's."""
    folder, dice = tmp_path_factory.mktemp("topics"), random.Random(2)
    lines = [
        " ".join(
            [f"u{user}", *(f"i{item:02}" for item in dice.sample(range(user % 10, 60, 10), 6))]
        )
        for user in range(80)
    ]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"i{item:02},topic{item % TOPICS} t{item % TOPICS} w{item} common" for item in range(60)
    ]
    rows[7] = "i07,"
    (folder / "items.csv").write_text("\n".join(["item,words", *rows]) + "\n")
    return prepare(folder / "log.txt", folder / "data", items=folder / "items.csv")


def truth(texts: list[str], history: list[int], term: TextTerm) -> list[float]:
    """The formula, word by word."""
    bags = [Counter(text.split()) for text in texts]
    with_word = Counter(word for bag in bags for word in bag)
    rows = []
    for bag in bags:
        row = {
            word: (1 + math.log(count)) * math.log((1 + len(texts)) / (1 + with_word[word]))
            for word, count in bag.items()
        }
        length = math.sqrt(sum(value * value for value in row.values())) or 1
        rows.append({word: value / length for word, value in row.items()})
    query: Counter[str] = Counter()
    for age, item in enumerate(history[::-1][: term.recent]):
        for word, value in rows[item].items():
            query[word] += term.decay**age * value
    near = [sum(query[word] * value for word, value in row.items()) ** term.power for row in rows]
    near = [0.0 if item in history else value for item, value in enumerate(near)]
    return [value / (sum(near) or 1) for value in near]


@pytest.mark.parametrize("term", [TextTerm(), TextTerm(recent=1, power=1.0, decay=0.5)])
def test_shares_are_those_of_the_formula(dataset: Dataset, term: TextTerm) -> None:
    histories = [[3, 13, 25, 4], [], [7], [11]]
    items = np.concatenate([np.array(history, np.int32) for history in histories])
    offsets = np.cumsum([0, *map(len, histories)])
    similarity = TextSimilarity.of(dataset, term)
    assert similarity is not None
    found = similarity.probabilities(items, offsets).numpy()
    texts = dataset.descriptions.texts
    for row, history in zip(found, histories, strict=True):
        np.testing.assert_allclose(row, truth(texts, history, term), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), [1, 0, 0, 1])


def test_settings_are_tuned_on_validation_alone(dataset: Dataset, tmp_path: Path) -> None:
    """Where the texts tell the topic, a sharp power is likelier than a flat one; what test holds
    does not matter."""
    term = tune_text(dataset, "words")
    assert (term.recent, term.decay) in HISTORIES
    assert term.power > min(POWERS)
    assert term.weight == 0
    log = (dataset.path.parent / "log.txt").read_text().splitlines()
    last = [line.split()[-1] for line in log]
    changed = [
        " ".join([*line.split()[:-1], item])
        for line, item in zip(log, last[3:] + last[:3], strict=True)
    ]
    (tmp_path / "log.txt").write_text("\n".join(changed) + "\n")
    other = prepare(
        tmp_path / "log.txt", tmp_path / "data", items=dataset.path.parent / "items.csv"
    )
    assert other.sequences.item_ids == dataset.sequences.item_ids
    assert tune_text(other, "words") == term
