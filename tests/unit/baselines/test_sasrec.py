"""SASRec against a plain padded one, blind to held-out items and to the future, and its run
directory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.file_lock import LOCK_FILE, hold
from genrec_shards.histories import histories
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences, sequences_from_ids
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from genrec_dist.baselines import popularity
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec.model import (
    SASRec,
    SasrecSettings,
    pack,
    rule_of,
    target_places,
)
from genrec_dist.baselines.sasrec.run import Training, open_or_train, sasrec_settings
from genrec_dist.baselines.sasrec.train import Epoch, TrainingParts, train
from genrec_dist.cli.app import app
from genrec_dist.distributed.signals import NotFinite

TINY = SasrecSettings(
    d_model=16, batch_size=16, epochs=3, max_length=12, dropout=0.2, validation_users=0
)
KEYS = ("d_model", "batch_size", "epochs", "max_length", "validation_users")
TINY_SET = [f"{key}={getattr(TINY, key)}" for key in KEYS]
SHAPE = dataclasses.replace(TINY, heads=2, ffn=2, init_std=0.5, dropout=0.0)
SHAPES = [
    dataclasses.replace(SHAPE, norm="paper"),
    dataclasses.replace(SHAPE, norm="pre", positions="from-end"),
    dataclasses.replace(SHAPE, norm="post"),
]
by_shape = pytest.mark.parametrize("settings", SHAPES, ids=lambda settings: settings.norm)


def made(num_users: int = 60, num_items: int = 40, seed: int = 0) -> Sequences:
    """No item twice, lengths 3 to 20."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 21, num_users)
    items = [str(item) for length in lengths for item in rng.permutation(num_items)[:length]]
    return sequences_from_ids([f"u{user}" for user in range(num_users)], lengths, items)


def changed(sequences: Sequences, places: tuple[int, ...]) -> Sequences:
    """The same catalogue, but another item at these places from the end (1: the last) of each
    sequence."""
    items = sequences.items.copy()
    for back in places:
        at = sequences.offsets[1:] - back
        items[at] = (items[at] + 1) % sequences.num_items
    return Sequences(items, sequences.offsets, sequences.user_ids, sequences.item_ids)


def made_model(sequences: Sequences, settings: SasrecSettings) -> SASRec:
    """Weights at random, biases too: a bias of zero could be left out unseen."""
    torch.manual_seed(1)
    model = SASRec(sequences.num_items, settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def weights_of(model: SASRec) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def weights_by_epoch(
    sequences: Sequences, settings: SasrecSettings = TINY, through: Any = "n-2"
) -> list[bytes]:
    seen: list[bytes] = []

    def keep(epoch: Epoch, model: SASRec) -> None:
        seen.append(weights_of(model))

    train(sequences, settings, exclude_history=True, trained_through=through, on_epoch=keep)
    assert len(seen) == settings.epochs
    return seen


# The model.


class PlainSASRec:
    """Padded on the right, attention with a mask, one user per row: as one would write it down."""

    def __init__(self, ours: SASRec):
        self.settings, self.weights = ours.settings, dict(ours.named_parameters())

    def linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return F.linear(values, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(values, values.shape[-1:], weight, bias)

    def attention(self, name: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shape = (*source.shape[:2], self.settings.heads, -1)
        query, key, value = (
            self.linear(f"{name}.{kind}", of).view(shape).transpose(1, 2)
            for kind, of in (("query", source), ("key", target), ("value", target))
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.out", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def feed_forward(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.narrow", self.linear(f"{name}.widen", values).relu())

    def logits(self, items_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        how = self.settings.norm
        places = torch.arange(items_BL.shape[1])[None]
        if self.settings.positions == "from-end":
            places = (lengths_B[:, None] - 1 - places).clamp(min=0)
        items_Id = self.weights["item_embedding.weight"]
        hidden = F.embedding(items_BL, items_Id) * math.sqrt(self.settings.d_model)
        hidden = hidden + F.embedding(places, self.weights["position_embedding.weight"])
        if how == "post":
            hidden = self.norm("norm", hidden)
        for layer in range(self.settings.layers):
            name = f"blocks.{layer}"
            before, after = f"{name}.attention_norm", f"{name}.ffn_norm"
            if how == "post":
                hidden = self.norm(before, hidden + self.attention(name, hidden, hidden))
                hidden = self.norm(after, hidden + self.feed_forward(name, hidden))
            elif how == "pre":
                normed = self.norm(before, hidden)
                hidden = hidden + self.attention(name, normed, normed)
                hidden = hidden + self.feed_forward(name, self.norm(after, hidden))
            else:
                normed = self.norm(before, hidden)
                normed = self.norm(after, normed + self.attention(name, normed, hidden))
                hidden = normed + self.feed_forward(name, normed)
        return (hidden if how == "post" else self.norm("norm", hidden)) @ items_Id.T


def plain_loss(model: SASRec, sequences: Sequences) -> torch.Tensor:
    settings = model.settings
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:] - 2, strict=True)
    parts = [sequences.items[a:b][-settings.max_length - 1 :].tolist() for a, b in bounds]
    parts = [part for part in parts if len(part) > 1]
    longest = max(map(len, parts))
    items_BL = torch.tensor([part[:-1] + [0] * (longest - len(part)) for part in parts])
    labels_BL = torch.tensor([part[1:] + [-100] * (longest - len(part)) for part in parts])
    lengths_B = torch.tensor([len(part) - 1 for part in parts])
    logits = PlainSASRec(model).logits(items_BL, lengths_B).flatten(0, 1)
    smoothing = settings.label_smoothing
    return F.cross_entropy(logits, labels_BL.flatten(), label_smoothing=smoothing)


@by_shape
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_equal_a_plain_padded_model(
    settings: SasrecSettings, smoothing: float
) -> None:
    sequences = made()
    options: dict[str, Any] = {"label_smoothing": smoothing, "precision": "fp32"}
    settings = dataclasses.replace(settings, batch_size=100, **options)
    model = made_model(sequences, settings)
    ((packed, labels_n, _),) = TrainingParts(sequences, settings, "n-2").batches(1)
    losses, gradients = [], []
    for loss in (model.loss(packed, labels_n), plain_loss(model, sequences)):
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, expected in gradients[1].items():
        # The softmax does not see a key's bias.
        assert expected.abs().max() > 0 or name.endswith("key.bias"), name
        assert (gradients[0][name] - expected).abs().max() <= 1e-5, name


def test_the_softmax_in_bf16_is_near() -> None:
    sequences, losses = made(300, 500), []
    options: dict[str, Any] = {"batch_size": 300, "init_std": 0.1}
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(SHAPES[0], precision=precision, **options)
        ((packed, labels_n, _),) = TrainingParts(sequences, settings, "n-2").batches(1)
        losses.append(float(made_model(sequences, settings).loss(packed, labels_n).detach()))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@by_shape
def test_a_later_item_changes_no_earlier_state(settings: SasrecSettings) -> None:
    sequences = made()
    model = made_model(sequences, settings).eval()
    ends_B, lengths_B = np.array([40, 9, 23]), np.array([8, 9, 5])
    other = sequences.items.copy()
    other[[37, 8, 21]] = (other[[37, 8, 21]] + 1) % sequences.num_items
    packed = [pack(items, ends_B, lengths_B, settings) for items in (sequences.items, other)]
    with torch.inference_mode():
        before, after = (model.states(each, model.item_rows()) for each in packed)
    reached = np.isin(packed[0].places_n, [37, 38, 39, 8, 21, 22])
    equal = (before == after).all(1).numpy()
    assert equal[~reached].all()
    assert not equal[reached].any()
    assert reached.sum() == 6


def test_pack_takes_the_newest_items_short_inputs_first() -> None:
    items, settings = np.arange(100, 120), SasrecSettings(max_length=4, positions="from-end")
    packed = pack(items, np.array([7, 10, 20]), np.array([7, 2, 3]), settings)
    assert packed.items_n.tolist() == [108, 109, 117, 118, 119, 103, 104, 105, 106]
    assert packed.positions_n.tolist() == [1, 0, 2, 1, 0, 3, 2, 1, 0]
    assert packed.items_n[packed.last_B].tolist() == [106, 109, 119]
    packed = pack(items, np.array([7, 10]), np.array([7, 2]), SasrecSettings(max_length=4))
    assert packed.positions_n.tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(("through", "held_out"), [("n-2", 2), ("n-1", 1)])
def test_an_epoch_has_each_item_of_a_training_part_as_a_target_once(
    through: Any, held_out: int
) -> None:
    sequences, settings = made(), SasrecSettings(batch_size=7, max_length=6)
    parts, expected, epochs = TrainingParts(sequences, settings, through), [], []
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:] - held_out, strict=True):
        expected += list(itertools.pairwise(sequences.items[start:end][-7:].tolist()))
    for epoch in (1, 2):
        pairs = []
        for packed, labels_n, _ in parts.batches(epoch):
            pairs += zip(packed.items_n.tolist(), labels_n.tolist(), strict=True)
        epochs.append(pairs)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1]


# Training.


@pytest.mark.parametrize(
    ("through", "unread", "read"), [("n-2", (1, 2), (3,)), ("n-1", (1,), (2,))]
)
def test_training_reads_no_held_out_item(
    through: str, unread: tuple[int, ...], read: tuple[int, ...]
) -> None:
    sequences = made()
    ours = weights_by_epoch(sequences, through=through)
    assert ours == weights_by_epoch(changed(sequences, unread), through=through)
    assert ours != weights_by_epoch(changed(sequences, read), through=through)


def test_test_items_do_not_choose_the_epoch() -> None:
    sequences = made()
    data = (sequences, changed(sequences, (1,)))
    ours, others = (train(each, TINY, exclude_history=True) for each in data)
    assert weights_of(ours.model) == weights_of(others.model)
    assert (ours.best.epoch, ours.best.scores) == (others.best.epoch, others.best.scores)


def test_a_seed_gives_one_run_and_leaves_the_callers_random_state_alone() -> None:
    sequences = made()
    settings = dataclasses.replace(TINY, attention_dropout=0.2, average=0.9)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights_by_epoch(sequences, settings)
    assert torch.equal(torch.rand(3), expected)
    assert first == weights_by_epoch(sequences, settings)
    assert first != weights_by_epoch(sequences, dataclasses.replace(settings, seed=1))


def test_sasrec_learns_what_popularity_cannot() -> None:
    """Who took item i takes i + 1 next."""
    rng = np.random.default_rng(3)
    lengths, first = rng.integers(5, 12, 200), rng.integers(0, 50, 200)
    items = [f"{(first[u] + k) % 50:02d}" for u in range(200) for k in range(lengths[u])]
    sequences = sequences_from_ids([f"u{user}" for user in range(200)], lengths, items)
    options: dict[str, Any] = {"learning_rate": 1e-2, "dropout": 0.1, "validation_users": 100}
    settings = dataclasses.replace(TINY, batch_size=32, epochs=12, **options)
    trained = train(sequences, settings, exclude_history=True)
    view = sequences.history_and_target("test")
    places = target_places(trained.model, view, np.arange(200), True)
    popular = popularity.fit(sequences, "test", exclude_history=True)(np.arange(200))
    assert (places == 1).mean() > 0.9
    assert (popular.ranks(histories(sequences, "test").targets_U) == 1).mean() < 0.1
    assert trained.best.users == 100
    assert trained.best.scores["NDCG@10"] > 0.9


def test_patience_ends_training_and_the_best_weights_are_kept() -> None:
    seen: list[tuple[Epoch, bytes]] = []
    settings = dataclasses.replace(TINY, epochs=40, patience=2, learning_rate=1e-2)

    def keep(epoch: Epoch, model: SASRec) -> None:
        seen.append((epoch, weights_of(model)))

    trained = train(made(), settings, exclude_history=True, on_epoch=keep)
    epochs = [epoch for epoch, _ in seen]
    best = max(epochs, key=lambda epoch: epoch.scores["NDCG@10"])
    assert trained.best == best
    assert [epoch for epoch in epochs if epoch.best][-1] == best
    assert trained.last.epoch == len(epochs) == best.epoch + 2 < 40
    assert weights_of(trained.model) == seen[best.epoch - 1][1] != seen[-1][1]


def test_the_average_is_what_is_validated_and_kept() -> None:
    sequences = made()
    settings = [
        dataclasses.replace(TINY, epochs=1, batch_size=8, average=average)
        for average in (0.0, 0.99)
    ]
    plain, averaged = (train(sequences, each, exclude_history=True) for each in settings)
    assert plain.best.loss == averaged.best.loss
    assert weights_of(plain.model) != weights_of(averaged.model)
    view, rows = sequences.history_and_target("validation"), np.arange(sequences.num_users)
    places = target_places(averaged.model, view, rows, True)
    assert (places <= 10).mean() == averaged.best.scores["HR@10"]


def test_training_refuses_a_loss_that_is_no_number_and_users_with_nothing_to_learn() -> None:
    with pytest.raises(NotFinite, match="lower learning_rate"):
        train(made(), dataclasses.replace(TINY, learning_rate=1e30), exclude_history=True)
    sequences = sequences_from_ids(["u", "v"], [3, 3], ["a", "b", "c", "c", "b", "a"])
    with pytest.raises(ValueError, match="no user has two items to train on"):
        train(sequences, TINY, exclude_history=True)
    assert train(sequences, TINY, exclude_history=True, trained_through="n-1").best.epoch == 3


# Lists.


@pytest.mark.parametrize("exclude", [True, False])
def test_lists_are_the_best_scores_without_the_whole_history(
    exclude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genrec_dist.baselines.sasrec.model.SCORES_AT_ONCE", 7 * 40)
    sequences = made()
    model = made_model(sequences, dataclasses.replace(SHAPES[1], max_length=5))
    rows = np.array([31, 2, 59, 7, 40, 1, 18, 5, 44])
    lists = rule_of(model, sequences, "test", exclude_history=exclude)(rows)
    view, plain = sequences.history_and_target("test"), PlainSASRec(model)
    for place, user in enumerate(rows):
        past = view.items[view.starts[user] : view.ends[user]]
        window = torch.from_numpy(past[-5:].astype(np.int64))[None]
        scores = plain.logits(window, torch.tensor([window.shape[1]]))[0, -1].detach().numpy()
        if exclude:
            scores[past] = -np.inf
        best = np.argsort(-scores)[:20]
        best = best[np.isfinite(scores[best])]
        listed = lists.items_UN[place]
        assert listed[listed >= 0].tolist() == best.tolist()
        found = lists.scores_UN[place][: len(best)]
        np.testing.assert_allclose(found, scores[best], rtol=1e-4, atol=1e-4)
    places = target_places(model, view, rows, exclude)
    assert np.array_equal(np.where(places <= 20, places, 0), lists.ranks(view.targets[rows]))
    assert model.training


def test_items_that_tie_rank_above_the_target() -> None:
    sequences = made()
    model = made_model(sequences, SHAPES[0])
    nn.init.zeros_(model.item_embedding.weight)
    view, rows = sequences.history_and_target("test"), np.arange(5)
    lengths = (view.ends - view.starts)[rows]
    assert (
        target_places(model, view, rows, True).tolist() == (sequences.num_items - lengths).tolist()
    )
    lists = rule_of(model, sequences, "test", exclude_history=True)(rows)
    assert not lists.ranks(view.targets[rows]).any()
    assert (lists.items_UN[:, 0] >= 0).all()


# The run directory.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("data"), made())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """With other test items."""
    return prepared(tmp_path_factory.mktemp("other"), changed(made(), (1,)))


def prepared(folder: Path, sequences: Sequences) -> Dataset:
    bounds = zip(sequences.user_ids, sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    lines = []
    for user, start, end in bounds:
        lines.append(" ".join([user, *(f"item-{row}" for row in sequences.items[start:end])]))
    (folder / "log.txt").write_text("\n".join(lines))
    return prepare(folder / "log.txt", folder / "prepared", numbering="random")


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, scored on validation."""
    path = tmp_path_factory.mktemp("run") / "sasrec"
    run_baseline("sasrec", dataset, "validation", path, settings=TINY_SET)
    return path


def events_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def stored(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Not the file's bytes: safetensors writes the keys of its metadata in any order."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


WEIGHTS = ("best.safetensors", "item_vectors.safetensors")


def assert_same_training(ours: Path, others: Path) -> None:
    """Weights, and epochs but for their times."""
    for name in WEIGHTS:
        assert stored(ours / name) == stored(others / name), name
    epochs = []
    for run in (ours, others):
        events = events_of(run)
        assert events[-1]["event"] == "end"
        of_run = [event for event in events if event["event"] == "epoch"]
        times = ("time", "seconds")
        epochs.append([{k: v for k, v in event.items() if k not in times} for event in of_run])
    assert epochs[0] == epochs[1]


def test_a_run_leaves_its_settings_events_weights_vectors_and_metrics(
    run: Path, dataset: Dataset
) -> None:
    names = {path.name for path in run.iterdir()} - {"metrics-test.json", "top20-test.parquet"}
    written = ("sasrec.yaml", "events.jsonl", "metrics-validation.json", "top20-validation.parquet")
    assert names == {*WEIGHTS, *written}
    events = events_of(run)
    assert [event["event"] for event in events] == ["start", "epoch", "epoch", "epoch", "end"]
    epochs = events[1:-1]
    keys = {"epoch", "loss", "HR@10", "NDCG@10", "seconds", "users", "best", "step"}
    assert keys <= set(epochs[0])
    assert epochs[0]["loss"] > epochs[-1]["loss"]
    assert 0 < epochs[0]["seconds"] < epochs[-1]["seconds"]
    metrics = json.loads((run / "metrics-validation.json").read_text())
    best = max(epochs, key=lambda event: event["NDCG@10"])
    assert {key: metrics[key] for key in ("NDCG@10", "HR@10")} == {
        key: best[key] for key in ("NDCG@10", "HR@10")
    }
    assert (metrics["system"], metrics["recipe"]["d_model"]) == ("sasrec", 16)
    assert metrics["recipe"]["best_epoch"] == best["epoch"]
    assert metrics["protocol"]["exclude_history"] is True
    assert set(metrics["beside"]) == {"counting", "popularity", "knn"}
    metadata, tensors = stored(run / WEIGHTS[1])
    assert tensors["item_vectors"] == stored(run / WEIGHTS[0])[1]["item_embedding.weight"]
    assert len(tensors["item_vectors"]) == dataset.sequences.num_items * 16 * 4
    assert metadata["sequences_hash"] == dataset.info.sequences_hash
    assert metadata["trained_through"] == "n-2"
    assert sasrec_settings(json.loads(metadata["settings"])) == sasrec_settings({}, TINY_SET)


def test_a_finished_run_is_scored_again_and_not_trained_again(run: Path, dataset: Dataset) -> None:
    names = ("events.jsonl", "best.safetensors", "sasrec.yaml")
    before = {name: (run / name).stat().st_mtime_ns for name in names}
    trained: list[Epoch] = []
    metrics = run_baseline("sasrec", dataset, "test", run, on_epoch=trained.append)
    options: dict[str, Any] = {"settings": ["d_model=16"], "exclude_history": False}
    assert run_baseline("sasrec", dataset, "test", run, **options)["users"] == 60
    again = run_baseline("sasrec", dataset, "test", run, settings=TINY_SET)
    assert not trained
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}
    assert again["NDCG@20"] == metrics["NDCG@20"]
    view = dataset.sequences.history_and_target("test")
    model = open_or_train(run, Training(dataset, "test", exclude_history=True)).model
    places = target_places(model, view, np.arange(60), True)
    assert metrics["HR@10"] == pytest.approx((places <= 10).mean())


def test_the_same_command_leaves_the_same_weights(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')  # of a run that was interrupted
    run_baseline("sasrec", dataset, "validation", tmp_path, settings=TINY_SET)
    for name in ("sasrec.yaml", "top20-validation.parquet"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name
    assert_same_training(tmp_path, run)
    assert len(events_of(tmp_path)) == 5


class Interrupted(Exception):
    pass


def interrupt_at(
    number: int, dataset: Dataset, out: Path, settings: list[str], **more: Any
) -> None:
    """A training that ends when it has reported this epoch, before it has kept it."""

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == number:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_baseline("sasrec", dataset, "test", out, settings=settings, on_epoch=stop, **more)
    assert not (out / "best.safetensors").exists()


SLOW_SET = [*TINY_SET, "epochs=6", "attention_dropout=0.2", "dropout=0.3", "weight_decay=0.1"]
SLOW_SET += ["learning_rate=0.01"]


@pytest.mark.parametrize(
    ("more", "through"),
    [(["average=0.9", "patience=2"], "n-2"), (["average=0"], "n-2"), (["average=0.9"], "n-1")],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(
    more: list[str], through: Any, dataset: Dataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"settings": [*SLOW_SET, *more], "trained_through": through}
    whole = run_baseline("sasrec", dataset, "test", tmp_path / "whole", **options)
    for number in (2, 4):  # in the second epoch, and once more
        interrupt_at(number, dataset, tmp_path / "parts", **options)
    seen: list[Epoch] = []
    parts = tmp_path / "parts"
    again = run_baseline("sasrec", dataset, "test", parts, on_epoch=seen.append, **options)
    assert seen[0].epoch == 4
    assert again["recipe"] == whole["recipe"]
    assert_same_training(parts, tmp_path / "whole")
    assert not (parts / "training.safetensors").exists()
    events = events_of(parts)
    assert [event["resumed_from"] for event in events if event["event"] == "start"] == [None, 1, 3]
    seconds = [event["seconds"] for event in events if event["event"] == "epoch"]
    assert seconds == sorted(seconds)


def test_a_training_whose_weights_were_not_written_at_the_end_only_writes_them(
    run: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("genrec_dist.baselines.sasrec.run._save", fail)
        with pytest.raises(Interrupted):
            run_baseline("sasrec", dataset, "validation", tmp_path, settings=TINY_SET)
    seen: list[Epoch] = []
    options: dict[str, Any] = {"settings": TINY_SET, "on_epoch": seen.append}
    run_baseline("sasrec", dataset, "validation", tmp_path, **options)
    assert not seen
    assert_same_training(tmp_path, run)


def refused(message: str, dataset: Dataset, out: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run_baseline("sasrec", dataset, options.pop("split", "test"), out, **options)
    assert "\n" not in str(error.value)


def test_what_is_not_the_interrupted_training_is_refused(
    dataset: Dataset, other: Dataset, tmp_path: Path
) -> None:
    interrupt_at(2, dataset, tmp_path, TINY_SET)
    tiny: dict[str, Any] = {"settings": TINY_SET}
    start = "interrupted training with "
    settings = f"{start}settings .*choose another --out"
    refused(settings, dataset, tmp_path, settings=[*TINY_SET, "dropout=0.1"])
    hashes = f"{start}sequences_hash .*remove it to train from the start"
    refused(hashes, other, tmp_path, **tiny)
    history = f"{start}exclude_history true, not false"
    refused(history, dataset, tmp_path, exclude_history=False, **tiny)
    through = f"{start}trained_through n-2, not n-1"
    refused(through, dataset, tmp_path, trained_through="n-1", **tiny)
    kept = tmp_path / "training.safetensors"
    kept.write_bytes(kept.read_bytes()[:-40])
    torn = r"training.safetensors: not readable .*remove it to train from the start"
    refused(torn, dataset, tmp_path, **tiny)


def test_what_another_run_or_other_data_left_is_refused(
    run: Path, dataset: Dataset, other: Dataset, tmp_path: Path
) -> None:
    refused("was trained on sequences .*choose another --out", other, run)
    settings = "was trained with d_model 16, not 8: choose another --out"
    refused(settings, dataset, run, settings=["d_model=8"])
    through = "trained through n-2: pass --trained-through n-2"
    refused(through, dataset, run, trained_through="n-1", settings=["epochs=3"])
    (tmp_path / WEIGHTS[0]).write_bytes((run / WEIGHTS[0]).read_bytes()[:-40])
    refused(r"best.safetensors: not readable .*train again", dataset, tmp_path)


def test_a_refit_trains_all_its_epochs(dataset: Dataset, tmp_path: Path) -> None:
    settings = [*TINY_SET, "patience=1"]
    options: dict[str, Any] = {"trained_through": "n-1", "settings": settings}
    metrics = run_baseline("sasrec", dataset, "test", tmp_path, **options)
    assert metrics["recipe"]["best_epoch"] == 3
    assert metrics["protocol"]["trained_through"] == "n-1"
    epochs = events_of(tmp_path)[1:-1]
    assert [("NDCG@10" in epoch, epoch["users"]) for epoch in epochs] == [(False, 0)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation", "trained_through": "n-1"}, "n-1 has seen the validation targets"),
        ({"trained_through": "n-1"}, "give --set epochs=N"),
        ({"settings": ["width=3"]}, "sasrec: unknown key width; known here: d_model"),
        ({"settings": ["d_model=wide"]}, "sasrec: d_model: 'wide' is not a whole number"),
        ({"settings": ["norm=none"]}, "sasrec: norm: 'none' is none of paper, pre, post"),
        ({"settings": ["d_model=9", "heads=2"]}, "sasrec: d_model 9 is no multiple of heads 2"),
        ({"settings": ["dropout=1"]}, "dropout is 1.0: it has to be 0 or above and below 1"),
        ({"settings": ["epochs=0"]}, "sasrec: epochs is 0: it has to be 1 or above"),
        ({"settings": ["init_std=0"]}, "sasrec: init_std is 0.0: it has to be above 0"),
        ({"settings": ["patience=-1"]}, "sasrec: patience is -1: it has to be 0 or above"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_nothing_written(
    options: dict[str, Any], message: str, dataset: Dataset, tmp_path: Path
) -> None:
    refused(message, dataset, tmp_path / "run", **dict(options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "nan", "foreign", "shape"])
def test_weights_that_are_not_the_models_are_refused(
    damage: str, dataset: Dataset, tmp_path: Path
) -> None:
    run_baseline("sasrec", dataset, "test", tmp_path, settings=TINY_SET)
    path, name = tmp_path / "best.safetensors", "item_embedding.weight"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if damage == "missing":
        del weights[name]
    elif damage == "nan":
        weights[name][2, 1] = float("nan")
    elif damage == "foreign":
        weights["adapter.weight"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata=metadata)
    tensor = "adapter.weight" if damage == "foreign" else name
    found = {
        "missing": "is missing",
        "nan": "holds numbers that are not finite",
        "foreign": "is none of the model's",
        "shape": "has the shape ",
    }
    with pytest.raises(ValueError, match=f"^{path}: tensor {tensor} {found[damage]}"):
        run_baseline("sasrec", dataset, "test", tmp_path, settings=TINY_SET)
    save_file(weights, path, metadata={"format_version": "1"})
    with pytest.raises(ValueError, match=f"^{path}: best_epoch is missing in its header"):
        run_baseline("sasrec", dataset, "test", tmp_path, settings=TINY_SET)


def test_the_command_trains_scores_and_refuses_settings_of_popularity(
    tiny_data: Path, tmp_path: Path
) -> None:
    words = [word for text in TINY_SET for word in ("--set", text)]
    command = ["baseline", "sasrec", str(tiny_data), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--split", "validation", *words])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("epoch ") == 3
    assert all(system in done.stdout for system in ("sasrec", "knn", "popularity"))
    command = ["baseline", "popularity", str(tiny_data), "--out", str(tmp_path / "other")]
    assert CliRunner().invoke(app, [*command, "--set", "d_model=8"]).exit_code == 2
    assert not (tmp_path / "other").exists()


def test_one_process_trains_a_run_and_a_finished_one_is_read_beside_it(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    held = r"\.lock: another process trains this run \(process \d+ on .* since .*\): wait"
    with hold(tmp_path / LOCK_FILE, "I"):
        refused(held, dataset, tmp_path)
    assert not list(tmp_path.iterdir())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with hold(run / LOCK_FILE, "I"):
        open_or_train(run, Training(dataset, "validation", exclude_history=True))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
