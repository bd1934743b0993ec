"""A thousand users of Beauty, a trained model, several sub-words an item: our lists and those of
Hugging Face's `generate`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from beam_oracle import hugging_face
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from two_ranks import environment

from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import EncoderInput, encode_histories, ragged
from genrec_dist.decoding.searcher import TopItems
from genrec_dist.inference.load import LoadedRun, load_run

pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(3000)]

NUM_USERS, BEAM, BATCH = 1000, 20, 50
CLOSE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """The run that GENREC_RUN names, or `tiny` for three short epochs, with so few sub-words that
    items have one to three and many begin alike."""
    if "GENREC_RUN" in os.environ:
        return load_run(os.environ["GENREC_RUN"])
    source = Path(os.environ.get("GENREC_DATA", "data")) / "Beauty.txt.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there: set GENREC_DATA to the folder of the real data sets")
    folder = tmp_path_factory.mktemp("beauty")
    write_shards(prepare(source, folder / "data", numbering="random"), folder / "data" / "shards")
    settings = {
        "data": folder / "data",
        "run": folder / "run",
        "tokens.vocab_size": 1024,
        "model.init_std": 0.1,
        "finetune.targets": "last",
        "finetune.epochs": 3,
        "validation.users": 1000,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "genrec_dist.cli", "train", "tiny", *overrides]
    subprocess.run(
        command,
        env=environment(OMP_NUM_THREADS="2"),
        check=True,
        timeout=2400,
        stdout=subprocess.DEVNULL,
    )
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def dataset(run: LoadedRun) -> Dataset:
    return load_dataset(load_recipe(run.path / "recipe.yaml").data)


def encoder_of(run: LoadedRun, dataset: Dataset, users: np.ndarray) -> EncoderInput:
    view = dataset.sequences.history_and_target("test")
    flat, offsets = ragged(view.starts[users], (view.ends - view.starts)[users])
    return encode_histories(view.items[flat], offsets, users, run.layout)


def lists_of_both(
    run: LoadedRun, dataset: Dataset, ends: str
) -> list[tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]]:
    """(items, scores) of `generate` and of our search, user by user."""
    both = []
    for start in range(0, NUM_USERS, BATCH):
        encoder = encoder_of(run, dataset, np.arange(start, start + BATCH))
        ours = run.searcher.search(encoder, beam=BEAM, top=BEAM, ends=ends)  # type: ignore[arg-type]
        assert_valid(ours, run.words.num_items)
        for number, theirs in enumerate(hugging_face(run.model, run.words, encoder, BEAM)):
            both.append((theirs, (ours.items[number].tolist(), ours.scores[number].tolist())))
    return both


def assert_valid(lists: TopItems, num_items: int) -> None:
    """0 invalid, 0 duplicates, and full."""
    assert lists.items.min() >= 0
    assert lists.items.max() < num_items
    assert all(len(set(row)) == BEAM for row in lists.items.tolist())


@pytest.fixture(scope="module")
def in_float64(run: LoadedRun) -> LoadedRun:
    model = load_run(run.path).model.double()
    return replace(run, model=model, searcher=run.searcher.of(model))


def test_items_have_several_lengths_and_common_beginnings(run: LoadedRun) -> None:
    trie = run.searcher.trie
    assert trie.depth >= 2
    assert ((trie.num_children > 0) & (trie.end_item >= 0)).any()


def test_beam_search_equals_generate_in_float64_by_its_rule_for_ends(
    in_float64: LoadedRun, dataset: Dataset
) -> None:
    """Hugging Face's valid results are the head of our list, in order, for each of the users."""
    for (theirs, their_scores), (ours, our_scores) in lists_of_both(in_float64, dataset, "ranked"):
        assert len(theirs) >= BEAM - 5
        assert ours[: len(theirs)] == theirs
        np.testing.assert_allclose(our_scores[: len(theirs)], their_scores, rtol=1e-6)


def test_beam_search_adds_only_items_that_score_higher_in_float64(
    in_float64: LoadedRun, dataset: Dataset
) -> None:
    """By our rule an end is never dropped: their items are in our lists in their order, except for
    those that an item they dropped pushes out at the end."""
    added = 0
    for (theirs, _), (ours, _) in lists_of_both(in_float64, dataset, "kept"):
        shared = [item for item in ours if item in theirs]
        assert shared == theirs[: len(shared)]
        assert len(ours) == BEAM
        added += len(ours) - len(shared)
    print(f"{added} of {NUM_USERS * BEAM} places hold an item that `generate` dropped")


def test_beam_search_differs_in_float32_only_where_scores_are_close(
    run: LoadedRun, dataset: Dataset
) -> None:
    differences = []
    for user, ((theirs, their_scores), (ours, our_scores)) in enumerate(
        lists_of_both(run, dataset, "ranked")
    ):
        their_score_of = dict(zip(theirs, their_scores, strict=True))
        for place, (item, other) in enumerate(zip(theirs, ours, strict=False)):
            if item != other:
                gap = abs(their_scores[place] - our_scores[place])
                differences.append((user, place, item, other, gap))
                assert gap < CLOSE, differences[-1]
                assert (
                    other not in their_score_of
                    or abs(their_score_of[other] - their_scores[place]) < CLOSE
                )
    print(f"{len(differences)} places differ in float32:", *differences, sep="\n")
