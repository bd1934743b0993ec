"""Soft targets: the graph without the user's own pairs, what they do to the loss, and that nothing
of what comes after a prefix is in them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.sequences import Sequences, offsets_of
from topic_data import write_data
from torch.nn import functional as F

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Distill, Recipe
from genrec_dist.data.item_graph import Graph, KnnSettings, forward_pairs
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.score_mixture import TextTerm
from genrec_dist.text.teacher import GraphWithoutUser, make_teacher, prefixes_of
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

KNN = KnnSettings(window=3, backward=0.2, recent=4, smoothing=2.0, out_power=0.5, in_power=0.2)
RECIPE = """
micro_batch_tokens: 256
workers: 0
log_every: 1
checkpoint_every: 5
keep_checkpoints: 99
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 16,
  dropout: 0, user_ids: false, encoder_attention: causal, decoder_start: state, init_std: 0.3}
tokens: {vocab_size: 400, trim: true, forced: given}
pretrain: {epochs: 0}
finetune: {epochs: 2, batch_size: 16, targets: all-prefixes, distill: {weight: 0.4, top: 7}}
validation: {users: 30}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("teacher"))


def recipe_in(folder: Path, data: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"data: {data}\nrun: {folder / 'run'}\n{RECIPE}")
    return load_recipe(path, list(overrides))


def with_rows(sequences: Sequences, rows: dict[int, list[int]]) -> Sequences:
    """The same with other sequences for some users."""
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    parts = [sequences.items[first:last].tolist() for first, last in bounds]
    parts = [rows.get(user, part) for user, part in enumerate(parts)]
    items = np.array([item for part in parts for item in part], np.int32)
    offsets = offsets_of(np.array([len(part) for part in parts]))
    return Sequences(items, offsets, sequences.user_ids, sequences.item_ids)


def sequence(sequences: Sequences, user: int) -> list[int]:
    return sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()


def test_the_graph_is_that_of_all_other_users(data: Path) -> None:
    sequences = load_dataset(data).sequences
    forward = forward_pairs(sequences, "n-2", KNN.window)
    found = GraphWithoutUser((KNN.forward * forward + KNN.backward * forward.T).tocsr(), KNN)
    for user in (0, 3, 17, 89):
        whole = sequence(sequences, user)
        # A training part of one item has no pair.
        without = with_rows(sequences, {user: [whole[0], *whole[-2:]]})
        part = np.array(whole[:-2])
        prefixes, offsets = prefixes_of(part)
        wanted = Graph.of(without, "test", "n-2", KNN).probabilities(prefixes, offsets)
        np.testing.assert_allclose(found.shares(part), wanted.numpy(), atol=1e-9)


@pytest.mark.parametrize("with_text", [True, False])
def test_a_prefix_knows_nothing_of_what_follows_it(data: Path, with_text: bool) -> None:
    """A user's later items of training change no bit of what is said after the earlier ones, and
    items that are held out change nothing."""
    dataset, user = load_dataset(data), 5
    whole = sequence(dataset.sequences, user)
    later = [*whole[:3], 7, 8, *whole[5:]]
    text = TextTerm() if with_text else None
    distill = Distill(weight=0.4, top=9)

    def of(rows: dict[int, list[int]]) -> Teacher:
        changed = replace(dataset, sequences=with_rows(dataset.sequences, rows))
        return make_teacher(changed, "n-2", distill, KNN, text, exclude_history=True)

    before, after, held_out = of({}), of({user: later}), of({user: [*whole[:-2], 7, 8]})
    first = before.first_U[user]
    for name in ("items_SK", "shares_SK"):
        one, other = getattr(before, name), getattr(after, name)
        assert np.array_equal(one[first : first + 3], other[first : first + 3])
        assert not np.array_equal(one, other)
        assert np.array_equal(one, getattr(held_out, name))
    np.testing.assert_allclose(before.shares_SK.sum(1), 0.4, rtol=1e-6)
    assert not np.isin(before.items_SK[first + 2][before.shares_SK[first + 2] > 0], whole[:3]).any()


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_mixed_targets(
    tiny_data: Path, tmp_path: Path, packed: bool
) -> None:
    """Of histories also that are too long to be read whole."""
    recipe = recipe_in(tmp_path, tiny_data, "tokens.vocab_size=600")
    setup, model = build_setup(recipe)
    reader, layout, stages = setup.reader, setup.layout, setup.stages

    def batches(teacher: Teacher | None) -> list:
        steps = StepBatches(stages, reader, layout, recipe, 0, 1, packed=packed, teacher=teacher)
        return steps[0].micro_batches

    for batch, plain in zip(batches(setup.teacher), batches(None), strict=True):
        if not packed:
            logits, labels = model.target_logits(plain)
            target = F.one_hot(labels, logits.shape[1]) * 0.6
            target.scatter_add_(1, batch.soft.tokens_nK, batch.soft.shares_nK)
            wanted = F.cross_entropy(logits, target, reduction="sum")
            torch.testing.assert_close(model(inputs=batch), wanted)
        assert len(batch.soft.tokens_nK) == batch.num_target_tokens

    # A teacher that says each prefix's own target changes nothing, which holds only if each label
    # gets the distribution of its prefix, also of those in windows of their own.
    sequences, true = setup.dataset.sequences, setup.teacher.items_SK[:, :1].copy()
    for user, first in enumerate(setup.teacher.first_U):
        part = sequence(sequences, user)[:-2]
        true[first : first + len(part) - 1, 0] = part[1:]
    knowing = replace(setup.teacher, items_SK=true, shares_SK=np.full(true.shape, 0.4, np.float32))
    shifted = replace(knowing, items_SK=np.roll(true, 1, axis=0))
    for batch, plain, other in zip(batches(knowing), batches(None), batches(shifted), strict=True):
        assert torch.equal(batch.soft.tokens_nK[:, 0], batch.labels[batch.labels >= 0])
        torch.testing.assert_close(model(inputs=batch), model(inputs=plain))
        assert (model(inputs=other) - model(inputs=plain)).detach().abs() > 1e-3


def test_a_run_resumes_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, data, "model.item_text=add")
    train(recipe)
    run = shutil.copytree(recipe.run, tmp_path / "again")
    for path in list_checkpoints(run)[1:]:
        shutil.rmtree(path)
    train(replace(recipe, run=str(run)), resume="latest")
    ours, theirs = (
        Checkpoint(list_checkpoints(each)[-1], {}, Ranks()).weights()
        for each in (run, Path(recipe.run))
    )
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


def test_what_has_no_soft_targets_is_refused(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        (["tokens.forced=learned"], r"finetune\.distill\.weight 0\.4: set finetune\.targets"),
        (["finetune.targets=last"], r"finetune\.distill\.weight 0\.4: set finetune\.targets"),
        (["finetune.distill.weight=1"], r"finetune\.distill\.weight is 1\.0"),
        (["tokens.vocab_size=285"], r"finetune\.distill\.weight: items have several tokens"),
        (["pretrain.distill.weight=0.1"], r"pretrain\.distill\.weight: finetuning alone"),
    ):
        with pytest.raises(ValueError, match=message):
            build_setup(recipe_in(tmp_path, data, *changes))
