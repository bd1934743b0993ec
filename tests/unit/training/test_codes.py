"""Recipe `codes`: a training whose lists are those of all items scored, and what its items begin
with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from topic_data import NUM_ITEMS, TOPICS, write_data

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.inference.load import load_run
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

SMALL = [
    "workers=0", "log_every=1", "precision=fp32", "tokens.vocab_size=330",
    "model.d_model=16", "model.encoder_layers=1", "model.decoder_layers=1", "model.heads=2",
    "model.ffn=32", "model.init_std=0.3", "model.max_tokens=16", "model.dropout=0",
    "finetune.epochs=3", "finetune.batch_size=16", "finetune.learning_rate=1e-2",
    "validation.users=0", "validation.every_epochs=1", "optimizer.ema_decay=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("codes"), numbering="combined", levels=(TOPICS,))


def recipe_of(data: Path, run: Path, *overrides: str) -> Recipe:
    return load_recipe("codes", [f"data={data}", f"run={run}", *SMALL, *overrides])


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_lists_of_a_trained_run_are_those_of_all_items(
    data: Path, tmp_path: Path, soft: float
) -> None:
    recipe = recipe_of(data, tmp_path / "run", f"finetune.distill.weight={soft}")
    train(recipe)
    run, sequences = load_run(recipe.run), load_dataset(data).sequences
    rows = np.arange(20)
    histories = [sequences.items[start : start + 5] for start in sequences.offsets[rows]]
    offsets = np.arange(len(rows) + 1) * 5
    encoder = encode_histories(np.concatenate(histories), offsets, rows, run.layout)
    excluded = np.repeat(rows, 5), np.concatenate(histories)
    search = run.searcher.search
    beam = search(encoder, beam=NUM_ITEMS, top=10, excluded=excluded)
    every = search(encoder, beam=10, top=10, mode="all", excluded=excluded)
    assert np.array_equal(beam.items, every.items)
    np.testing.assert_allclose(beam.scores, every.scores, rtol=1e-5, atol=1e-5)
    for listed, history in zip(beam.items, histories, strict=True):
        assert len(set(listed.tolist())) == 10
        assert (listed >= 0).all()
        assert not set(listed.tolist()) & set(history.tolist())
    # Users stay in one topic, of whose 10 items a history has 5: it is learned where the other 5
    # come first.
    same = np.mean([(listed[:5] % TOPICS == h[0] % TOPICS).mean()
                    for listed, h in zip(beam.items, histories, strict=True)])  # fmt: skip
    assert same > 0.7
    # All items together have probability 1.
    whole = search(encoder, beam=10, top=NUM_ITEMS, mode="all")
    np.testing.assert_allclose(np.exp(whole.scores.astype(np.float64)).sum(1), 1, rtol=1e-4)


def test_tokens_begin_beside_their_items(data: Path, tmp_path: Path) -> None:
    _, model = build_setup(recipe_of(data, tmp_path / "run"))
    setup, _ = build_setup(recipe_of(data, tmp_path / "run", "model.init_items=random"))
    tokens, offsets = setup.words.tokens_of_items()
    clusters = torch.from_numpy(tokens[offsets[:-1]].astype(np.int64))
    items_ND = torch.nn.functional.normalize(model.item_embedding.weight[1:].detach())
    near_NN = (
        torch.nn.functional.normalize(model.model.shared.weight.detach())[clusters] @ items_ND.T
    )
    own = near_NN.diagonal().mean()
    other = near_NN[clusters[:, None] != clusters].mean()
    assert own > other + 0.3
