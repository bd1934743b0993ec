"""Items' texts in the rows of their tokens: against an explicit sum, through training, resume and
saving, and for items that training never shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from topic_data import NUM_ITEMS, TOPICS, UNSEEN, write_data
from two_ranks import start_each

from genrec_dist.config.load import dump_recipe, load_recipe, recipe_from
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.recommend import Recommender
from genrec_dist.model.item_rows import texts_in_table
from genrec_dist.text.vectors import item_vectors
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

RECIPE = """
micro_batch_tokens: 256
workers: 0
log_every: 1
checkpoint_every: 5
keep_checkpoints: 99
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 32,
  user_ids: false, encoder_attention: causal, decoder_start: state, item_text: add}
tokens: {vocab_size: 400, trim: true, forced: given}
pretrain: {epochs: 0}
finetune: {epochs: 2, batch_size: 16, learning_rate: 1.0e-2, targets: all-prefixes}
optimizer: {ema_decay: 0.9}
validation: {users: 30}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("text"))


def recipe_in(folder: Path, data: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"data: {data}\nrun: {folder / 'run'}\n{RECIPE}")
    return load_recipe(path, list(overrides))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("finished")
    # Validated once, so that the last weights are kept.
    changes = ("finetune.epochs=10", "validation.every_epochs=10")
    recipe = recipe_in(folder, data, *changes)
    train(recipe)
    return recipe


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["random", "cooccurrence"])
def test_loss_and_gradients_are_those_of_the_explicit_sum(
    data: Path, tmp_path: Path, packed: bool, how: str
) -> None:
    recipe = recipe_in(tmp_path, data, f"model.init_items={how}", "model.dropout=0")
    setup, model = build_setup(recipe)
    _, plain = build_setup(replace(recipe, model=replace(recipe.model, item_text="none")))
    reader, layout = setup.reader, setup.layout
    share = StepBatches(setup.stages, reader, layout, recipe, 0, 1, packed=packed)[0]
    tokens = torch.from_numpy(setup.words.tokens_of_items()[0].astype(np.int64))
    vectors = torch.from_numpy(item_vectors(setup.dataset, "factors"))
    projection = model.item_text.projection_FD
    own, explicit = torch.ones(len(model.model.shared.weight), 1), plain.model.shared.weight
    own[tokens[UNSEEN]] = 0
    with torch.no_grad():
        explicit.copy_(model.model.shared.weight)
        explicit[tokens] += vectors @ projection
        explicit.mul_(own)  # the row of an item that training never shows is 0
    losses = [each(inputs=share.micro_batches[0], label_smoothing=0.1) for each in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    found, wanted = model.model.shared.weight.grad, explicit.grad
    torch.testing.assert_close(found, wanted * own)
    torch.testing.assert_close(projection.grad, vectors.T @ (wanted * own)[tokens])
    assert wanted[tokens[UNSEEN]].any()
    for name, parameter in plain.named_parameters():
        if name != "model.shared.weight" and parameter.grad is not None:
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, parameter.grad)


def test_the_table_holds_the_texts_inside_the_context_alone(data: Path, tmp_path: Path) -> None:
    _, model = build_setup(recipe_in(tmp_path, data))
    before, summed = (
        model.model.shared.weight.clone(),
        model.item_text.whole(model.model.shared.weight),
    )
    with texts_in_table(model):
        assert torch.equal(model.model.shared.weight, summed)
        assert torch.equal(model.head_weight, summed[: model.config.spoken_tokens])
        assert not any("item_text" in name for name in model.state_dict())
    assert torch.equal(model.model.shared.weight, before)
    assert model.item_text is not None


def test_texts_begin_where_items_of_like_texts_are(data: Path, tmp_path: Path) -> None:
    """The fitted projection against numpy's least squares with penalty rows; `init` starts with the
    same sums, and has nothing of texts afterwards."""
    chosen = "model.init_items=cooccurrence"
    setup, model = build_setup(recipe_in(tmp_path, data, chosen))
    _, begun = build_setup(recipe_in(tmp_path, data, chosen, "model.item_text=init"))
    rows = setup.words.tokens_of_items()[0]
    known = np.arange(NUM_ITEMS) != UNSEEN
    texts = item_vectors(setup.dataset, "factors").astype(np.float64)
    penalised = np.concatenate([texts[known], np.eye(texts.shape[1])])
    table = model.model.shared.weight.detach().numpy()
    wanted = np.concatenate([table[rows[known]], np.zeros((texts.shape[1], 16))])
    fitted = np.linalg.lstsq(penalised, wanted, rcond=None)[0]
    np.testing.assert_allclose(model.item_text.projection_FD.detach(), fitted, atol=1e-5)
    assert begun.item_text is None
    sums = model.item_text.whole(model.model.shared.weight)
    assert torch.equal(begun.model.shared.weight, sums)


def test_an_item_that_training_never_shows_is_ranked_by_its_text(finished: Recipe) -> None:
    """Among the items of its topic for users of that topic, and for no others."""
    recommender = Recommender.load(finished.run)
    places = []
    for user in range(TOPICS):  # of as many topics
        topic = [f"i{item:02}" for item in range(user, NUM_ITEMS, TOPICS) if item != UNSEEN]
        items = recommender.recommend([topic[:6]], k=20)[0].items
        places.append(items.index(f"i{UNSEEN}") if f"i{UNSEEN}" in items else 20)
    # Three trained items of the topic are left.
    assert places.pop(UNSEEN % TOPICS) == 3
    assert min(places) > 3


def test_best_needs_no_texts_and_is_the_average_with_them(
    finished: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(finished.run) / "best", tmp_path / "best")
    monkeypatch.setattr("genrec_dist.text.vectors.item_vectors", None)
    assert Recommender.load(tmp_path).recommend([["i01", "i07"]], k=3)


def test_resume_reaches_the_same_bits(finished: Recipe, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    for path in list_checkpoints(run)[2:]:
        shutil.rmtree(path)
    shutil.rmtree(run / "best")
    train(replace(finished, run=str(run)), resume="latest")
    for kind in ("weight", "exp_avg_sq", "average"):
        ours, theirs = (
            Checkpoint(list_checkpoints(each)[-1], {}, Ranks()).weights(kind)
            for each in (run, Path(finished.run))
        )
        assert "item_text.projection_FD" in ours
        assert all(torch.equal(ours[name], values) for name, values in theirs.items())
    names = ("best/model.safetensors", "best/config.json")
    assert all((run / n).read_bytes() == (Path(finished.run) / n).read_bytes() for n in names)


def test_other_texts_are_no_resume(finished: Recipe, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished.run, tmp_path / "run")
    changed = shutil.copytree(data, tmp_path / "data")
    items = tmp_path / "items.csv"
    titles = (data.parent / "items.csv").read_text()
    items.write_text(titles.replace("i01,topic1", "i01,topic2"))
    dataset = prepare(data.parent / "log.txt", changed, items=items, overwrite=True)
    write_shards(dataset, changed / "shards", users_per_shard=32, users_per_record=16)
    with pytest.raises(ValueError, match="item_text"):
        train(replace(finished, run=str(run), data=str(changed)), resume="latest")


@pytest.mark.parametrize("how", ["add", "init"])
def test_what_is_held_out_changes_no_bit(data: Path, tmp_path: Path, how: str) -> None:
    other = write_data(tmp_path / "other", swap_held_out=True)
    assert load_dataset(other).sequences.sequences_hash() != (
        load_dataset(data).sequences.sequences_hash()
    )
    changes = ("model.init_items=cooccurrence", f"model.item_text={how}")
    found = [build_setup(recipe_in(tmp_path, each, *changes))[1] for each in (data, other)]
    tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in found]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_what_cannot_have_texts_is_refused(data: Path, tmp_path: Path) -> None:
    for change, message in (
        ("tokens.vocab_size=285", r"model\.item_text: items have several tokens"),
        ("model.item_text_source=words", r"item_text_source words: .* set factors"),
        (f"init_from={tmp_path}", r"model\.item_text add: init_from takes the rows"),
    ):
        with pytest.raises(ValueError, match=message):
            build_setup(recipe_in(tmp_path, data, change))
    with pytest.raises(ValueError, match=r"model\.item_text: a model with a prompt"):
        recipe_from(
            {
                "data": "d",
                "run": "r",
                "model": {"item_text": "add"},
                "prompt": {"template": "a {history} b"},
                "finetune": {"targets": "all-prefixes"},
            }
        )


@pytest.mark.ranks
@pytest.mark.parametrize("ids", ["dense", "row-adagrad"])
def test_two_ranks_take_the_steps_of_one(data: Path, tmp_path: Path, ids: str) -> None:
    changes = (f"optimizer.id_tables={ids}", "optimizer.eps=1e-4", "model.dropout=0")
    alone = recipe_in(tmp_path, data, *changes)
    train(alone)
    recipe = replace(alone, run=str(tmp_path / "two"))
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe))
    arguments = ["-m", "genrec_dist.train", tmp_path / "two.yaml"]
    done = start_each(arguments, tmp_path / "logs", timeout=300)
    assert not any(rank.returncode for rank in done), done
    ours, theirs = (
        Checkpoint(list_checkpoints(Path(each.run))[-1], {}, Ranks()).weights()
        for each in (alone, recipe)
    )
    for name, values in ours.items():
        torch.testing.assert_close(theirs[name], values, atol=2e-4, rtol=1e-3)
