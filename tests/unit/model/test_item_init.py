"""Item rows that begin with co-occurrence: the factors of the training parts, where they go, and
that nothing leaks into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.numbering.cooccurrence import cooccurrences, neighbour_vectors
from genrec_shards.sequences import Sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.baselines.sasrec_model import SasrecSettings
from genrec_dist.baselines.sasrec_train import train as train_sasrec
from genrec_dist.config.load import load_recipe
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.setup import Workshop, open_workshop

COOCCURRENCE = "model.init_items=cooccurrence"


def opened(recipe: Path, *overrides: str) -> tuple[Workshop, GenRecForConditionalGeneration]:
    return open_workshop(load_recipe(recipe, list(overrides)))


def directions(rows_NF: np.ndarray) -> np.ndarray:
    """Cosines of all pairs: what is left where factors may be turned and mirrored. Ours are
    iterated eight times, to two digits."""
    units_NF = rows_NF / np.maximum(np.linalg.norm(rows_NF, axis=1, keepdims=True), 1e-12)
    return units_NF @ units_NF.T


def expected_directions(sequences: Sequences, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """By numpy's own decomposition; and which items have a neighbour."""
    weights = cooccurrences(sequences, 6).toarray()
    scale = 1 / np.sqrt(weights.sum(1) + 1)
    left, values, _ = np.linalg.svd(scale[:, None] * weights * scale)
    vectors = left[:, :dims] * np.sqrt(values[:dims])
    known = weights.sum(1) > 0
    return directions(vectors[known] - vectors[known].mean(0)), known


@pytest.fixture(scope="module")
def sequences(tiny_data: Path) -> Sequences:
    return load_dataset(tiny_data).sequences


def test_one_token_an_item_begins_in_the_rows_of_the_tokens(
    tiny_recipe: Path, sequences: Sequences
) -> None:
    one_token = "tokens.vocab_size=600"
    workshop, model = opened(tiny_recipe, one_token, COOCCURRENCE)
    _, plain = opened(tiny_recipe, one_token)
    tokens, offsets = workshop.words.tokens_of_items()
    assert (np.diff(offsets) == 1).all()
    rows = model.model.shared.weight.detach().numpy()
    expected, known = expected_directions(sequences, 16)
    np.testing.assert_allclose(directions(rows[tokens][known]), expected, atol=0.02)
    np.testing.assert_allclose(
        np.linalg.norm(rows[tokens][known], axis=1), 0.3 * 16**0.5, rtol=1e-5
    )
    initialised = np.zeros(len(rows), bool)
    initialised[tokens[known]] = True
    assert np.array_equal(rows[~initialised], plain.model.shared.weight.detach().numpy()[~initialised])
    assert torch.equal(model.item_embedding.weight, plain.item_embedding.weight)
    assert model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()


def test_several_tokens_an_item_begin_in_the_id_table(
    tiny_recipe: Path, sequences: Sequences
) -> None:
    _, model = opened(tiny_recipe, COOCCURRENCE)
    _, plain = opened(tiny_recipe)
    assert torch.equal(model.model.shared.weight, plain.model.shared.weight)
    expected, known = expected_directions(sequences, 16)
    rows = model.item_embedding.weight.detach().numpy()
    np.testing.assert_allclose(directions(rows[1:][known]), expected, atol=0.02)
    assert not rows[0].any()


def test_rows_wider_than_there_are_factors_keep_their_other_columns(
    tiny_recipe: Path, sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genrec_dist.training.setup.MOST_FACTORS", 6)
    _, model = opened(tiny_recipe, COOCCURRENCE)
    _, plain = opened(tiny_recipe)
    expected, known = expected_directions(sequences, 6)
    rows = model.item_embedding.weight.detach().numpy()[1:][known]
    np.testing.assert_allclose(directions(rows[:, :6]), expected, atol=0.02)
    assert np.array_equal(
        rows[:, 6:], plain.item_embedding.weight.detach().numpy()[1:][known][:, 6:]
    )


def test_sasrec_as_its_control_begins_so_too(sequences: Sequences) -> None:
    # A rate at which nothing moves.
    still = {"d_model": 16, "epochs": 1, "learning_rate": 1e-12, "average": 0.0, "init_std": 0.3}
    rows, plain = (
        train_sasrec(sequences, SasrecSettings(**still, init_items=how), exclude_history=True)  # type: ignore[arg-type]
        .model.item_embedding.weight.detach().numpy()
        for how in ("cooccurrence", "random")
    )  # fmt: skip
    expected, known = expected_directions(sequences, 16)
    np.testing.assert_allclose(directions(rows[known]), expected, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(rows[known], axis=1), 0.3 * 16**0.5, rtol=1e-4)
    assert not np.allclose(directions(plain[known]), expected, atol=0.3)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_held_out_item_moves_a_bit(data: st.DataObject) -> None:
    num_items = 12
    users = data.draw(
        st.lists(
            st.lists(st.integers(0, num_items - 1), min_size=3, max_size=9), min_size=2, max_size=8
        )
    )
    found = []
    for _ in range(2):
        held_out = [
            data.draw(st.lists(st.integers(0, num_items - 1), min_size=2, max_size=2))
            for _ in users
        ]
        items = [[*user[:-2], *last] for user, last in zip(users, held_out, strict=True)]
        found.append(
            neighbour_vectors(
                Sequences(
                    np.array([item for user in items for item in user], np.int32),
                    np.cumsum([0, *map(len, items)]),
                    [str(row) for row in range(len(items))],
                    [str(row) for row in range(num_items)],
                ),
                4,
                seed=1,
            ).tobytes()
        )
    assert found[0] == found[1]


def test_several_tokens_without_ids_have_no_row_to_begin(tiny_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_items: items have several tokens and no id"):
        opened(tiny_recipe, COOCCURRENCE, "model.item_ids=false")


def test_tables_outside_the_model_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.init_items cooccurrence: .* optimizer\.id_tables dense"
    ):
        load_recipe(tiny_recipe, [COOCCURRENCE, "optimizer.id_tables=row-adagrad", "optimizer.decay=none"])
