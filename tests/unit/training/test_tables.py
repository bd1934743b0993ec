"""Id tables outside the model: the same numbers as tables within, only touched rows changed, a
plain model as `best`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_events import events

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.load import load_run
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.id_tables import IdTables, plan_ids
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

RECIPE = """
data: {data}
run: {run}
micro_batch_tokens: 1024
workers: 0
log_every: 1
checkpoint_every: 8
keep_checkpoints: 99
model: {{d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 16,
  max_tokens: 64, id_dim: {id_dim}, init_std: 0.1}}
tokens: {{vocab_size: 300}}
finetune: {{epochs: 2, batch_size: 100, targets: every-prefix}}
optimizer: {{id_tables: row-adagrad}}
validation: {{users: 30, patience: 0}}
"""


@pytest.fixture(params=[0, 6])
def recipe(request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=tiny_data, run=tmp_path / "run", id_dim=request.param))
    return load_recipe(path)


def first_step(recipe: Recipe) -> tuple[GenRecForConditionalGeneration, RankStep, RankStep]:
    """A model, and its first step with ids as table rows and as places."""
    setup, model = build_setup(recipe)
    rows = StepBatches(setup.stages, setup.reader, setup.layout, recipe, 0, 1)[0]
    return model.eval(), rows, plan_ids(rows, model.config)


def with_tables(
    recipe: Recipe, model: GenRecForConditionalGeneration, tables: IdTables
) -> GenRecForConditionalGeneration:
    inside = tables.whole(model)
    assert inside is not None
    assert isinstance(inside.item_embedding, torch.nn.Embedding)
    return inside


def test_rows_from_outside_are_read_and_learned_as_rows_within(recipe: Recipe) -> None:
    model, rows, places = first_step(recipe)
    assert len(rows.micro_batches) > 1
    tables = IdTables(model.config, recipe.seed, Ranks(), model.device)
    inside = with_tables(recipe, model, tables)
    tables.attach(model, places)
    for here, there in zip(places.micro_batches, rows.micro_batches, strict=True):
        logits = []
        for which, batch in ((model, here), (inside, there)):
            found, labels = which.target_logits(batch)
            torch.nn.functional.cross_entropy(found, labels, reduction="sum").backward()
            logits.append(found)
        assert torch.equal(*logits)
    for kind, embedding in (("user", inside.user_embedding), ("item", inside.item_embedding)):
        gradient, leaf = embedding.weight.grad, tables.leaves[kind]
        assert torch.allclose(gradient[places.id_rows[kind] + 1], leaf.grad[1:], atol=1e-6)
        touched = torch.zeros(len(gradient), dtype=torch.bool)
        touched[places.id_rows[kind] + 1] = True
        assert not gradient[~touched].any()
        assert not leaf.grad[0].any()


def test_a_step_changes_touched_rows_alone(recipe: Recipe) -> None:
    setup, model = build_setup(recipe)
    loop = Loop(setup, model, make_accelerator(recipe))
    before = {kind: table.full().clone() for kind, table in loop.tables.tables.items()}
    step, share = next(loop.batches())
    loop.take_step(step, share, loop.step_totals(share), recipe.finetune, 1.0)
    for kind, table in loop.tables.tables.items():
        changed = (table.full() != before[kind]).any(dim=1)
        assert torch.equal(torch.nonzero(changed).flatten(), share.id_rows[kind])


def test_a_run_leaves_a_plain_model(recipe: Recipe) -> None:
    run = train(recipe)
    loaded = load_run(run)
    config = loaded.model.config
    assert not config.ids_outside
    width = recipe.model.id_dim or recipe.model.d_model
    assert loaded.model.item_embedding.weight.shape == (config.num_items + 1, width)
    assert not loaded.model.item_embedding.weight[0].any()
    names = {path.name for path in list_checkpoints(run)[-1].iterdir()}
    assert {"ids-user-00000-of-00001.safetensors", "ids-item-00000-of-00001.safetensors"} < names


def test_a_resume_goes_on_to_the_bit(recipe: Recipe) -> None:
    run = train(recipe)
    last = list_checkpoints(run)[-1]
    whole = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    (run / "events.jsonl").unlink()
    train(recipe, resume=str(list_checkpoints(run)[1]))
    for name, content in whole.items():
        assert (last / name).read_bytes() == content, name


EPOCHS = 6


@pytest.mark.parametrize("recipe", [6], indirect=True)
def test_rows_alone_lower_the_loss(recipe: Recipe, tmp_path: Path) -> None:
    """All else stands still, so what is learned is the tables'; and with tables that stand still
    too, nothing is."""
    # Steps count here, so that each is a plain one and no checkpoint is left but the last.
    stage = replace(recipe.finetune, epochs=EPOCHS, learning_rate=1e-9)
    still = replace(recipe, finetune=stage, model=replace(recipe.model, dropout=0.0))
    still = replace(still, packing="padded", micro_batch_tokens=8192, checkpoint_every=10_000)
    still = replace(still, validation=replace(recipe.validation, every_epochs=EPOCHS))
    fallen = []
    for name, rate in (("learning", 0.3), ("frozen", 1e-9)):
        optimizer = replace(recipe.optimizer, id_learning_rate=rate)
        run = train(replace(still, run=str(tmp_path / name), optimizer=optimizer))
        losses = [event["loss"] for event in events(run, "step")]
        epoch = len(losses) // EPOCHS
        fallen.append(np.mean(losses[:epoch]) - np.mean(losses[-epoch:]))
    # An epoch's steps are not of one size, so also without learning two epochs' means differ a
    # little.
    assert fallen[0] > 0.01
    assert abs(fallen[1]) < 0.006


def test_decay_of_everything_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ValueError, match=r"optimizer\.decay all: row-adagrad decays no ids"):
        load_recipe(path, ["optimizer.decay=all"])
