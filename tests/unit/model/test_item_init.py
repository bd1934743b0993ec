"""Item rows initialised with co-occurrence: the factors of the training parts, which rows get them,
and that nothing leaks into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.numbering.cooccurrence import cooccurrences, neighbour_vectors
from genrec_shards.sequences import Sequences, offsets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.baselines.sasrec.model import SasrecSettings
from genrec_dist.baselines.sasrec.train import train as train_sasrec
from genrec_dist.config.load import load_recipe
from genrec_dist.training.setup import build_setup

COOCCURRENCE = "model.init_items=cooccurrence"
LENGTH = 0.3 * 16**0.5
"""Of a random row of 16 columns with standard deviation 0.3."""


def opened(recipe: Path, *overrides: str):
    return build_setup(load_recipe(recipe, list(overrides)))


def directions(rows_NF: np.ndarray) -> np.ndarray:
    """Cosines of all pairs: what is left where factors may be turned and mirrored. Ours are
    iterated eight times, to two digits."""
    units_NF = rows_NF / np.maximum(np.linalg.norm(rows_NF, axis=1, keepdims=True), 1e-12)
    return units_NF @ units_NF.T


def values(table: torch.nn.Embedding) -> np.ndarray:
    return table.weight.detach().numpy()


@pytest.fixture(scope="module")
def sequences(tiny_data: Path) -> Sequences:
    return load_dataset(tiny_data).sequences


def assert_initialised(
    rows_NF: np.ndarray, sequences: Sequences, dims: int = 16, atol: float = 0.02
) -> np.ndarray:
    """The rows have the directions of numpy's own decomposition; returns the items that have a
    neighbour."""
    weights = cooccurrences(sequences, 6).toarray()
    scale = 1 / np.sqrt(weights.sum(1) + 1)
    left, singular, _ = np.linalg.svd(scale[:, None] * weights * scale)
    vectors, known = left[:, :dims] * np.sqrt(singular[:dims]), weights.sum(1) > 0
    expected = directions(vectors[known] - vectors[known].mean(0))
    np.testing.assert_allclose(directions(rows_NF[known, :dims]), expected, atol=atol)
    return known


def test_items_of_one_token_have_it_in_the_rows_of_their_tokens(tiny_recipe, sequences) -> None:
    one_token = "tokens.vocab_size=600"
    setup, model = opened(tiny_recipe, one_token, COOCCURRENCE)
    _, plain = opened(tiny_recipe, one_token)
    tokens, offsets = setup.words.tokens_of_items()
    assert (np.diff(offsets) == 1).all()
    rows = values(model.model.shared)
    known = assert_initialised(rows[tokens], sequences)
    np.testing.assert_allclose(np.linalg.norm(rows[tokens][known], axis=1), LENGTH, rtol=1e-5)
    others = np.setdiff1d(np.arange(len(rows)), tokens[known])
    assert np.array_equal(rows[others], values(plain.model.shared)[others])
    assert torch.equal(model.item_embedding.weight, plain.item_embedding.weight)
    assert model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()


@pytest.mark.parametrize("most_factors", [16, 6])
def test_items_of_several_tokens_have_it_in_the_id_table(
    tiny_recipe, sequences, most_factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns beyond the factors keep their values."""
    monkeypatch.setattr("genrec_dist.training.setup.MOST_FACTORS", most_factors)
    _, model = opened(tiny_recipe, COOCCURRENCE)
    _, plain = opened(tiny_recipe)
    assert torch.equal(model.model.shared.weight, plain.model.shared.weight)
    rows, before = values(model.item_embedding), values(plain.item_embedding)
    known = assert_initialised(rows[1:], sequences, most_factors)
    assert not rows[0].any()
    assert np.array_equal(rows[1:][known][:, most_factors:], before[1:][known][:, most_factors:])


def test_sasrec_as_its_control_is_initialised_so_too(sequences: Sequences) -> None:
    # A rate at which nothing moves.
    still = {"d_model": 16, "epochs": 1, "learning_rate": 1e-12, "average": 0.0, "init_std": 0.3}
    rows, plain = (
        values(
            train_sasrec(
                sequences, SasrecSettings(**still, init_items=how), exclude_history=True
            ).model.item_embedding
        )
        for how in ("cooccurrence", "random")
    )
    known = assert_initialised(rows, sequences)
    np.testing.assert_allclose(np.linalg.norm(rows[known], axis=1), LENGTH, rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_initialised(plain, sequences, atol=0.3)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_held_out_item_changes_a_bit(data: st.DataObject) -> None:
    item = st.integers(0, 11)
    users = data.draw(st.lists(st.lists(item, min_size=3, max_size=9), min_size=2, max_size=8))
    ids = [str(row) for row in range(12)]
    found = []
    for _ in range(2):
        held_out = [data.draw(st.lists(item, min_size=2, max_size=2)) for _ in users]
        rows = [[*user[:-2], *last] for user, last in zip(users, held_out, strict=True)]
        items = np.array([item for row in rows for item in row], np.int32)
        offsets = offsets_of(np.array([len(row) for row in rows]))
        found.append(neighbour_vectors(Sequences(items, offsets, ids[: len(rows)], ids), 4, seed=1))
    assert found[0].tobytes() == found[1].tobytes()


def test_init_items_refuses_items_without_rows_of_their_own(tiny_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_items: items have several tokens and no id"):
        opened(tiny_recipe, COOCCURRENCE, "model.item_ids=false")
    outside = ["optimizer.id_tables=row-adagrad", "optimizer.decay=none"]
    message = r"model\.init_items cooccurrence: .* optimizer\.id_tables dense"
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe, [COOCCURRENCE, *outside])
