"""SASRec against a plain padded one, blind to held-out items and to the future, and its run
directory."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.histories import histories
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences, sequences_from_ids
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from genrec_dist.baselines import registry as baseline
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec_model import (
    Packed,
    SASRec,
    SasrecSettings,
    check_settings,
    pack,
    rule_of,
    target_places,
)
from genrec_dist.baselines.sasrec_run import open_or_train, sasrec_settings
from genrec_dist.baselines.sasrec_train import Epoch, Trained, TrainingParts, train
from genrec_dist.cli.app import app
from genrec_dist.distributed.signals import NotFinite

TINY = SasrecSettings(
    d_model=16, batch_size=16, epochs=3, max_length=12, dropout=0.2, validation_users=0
)
TINY_SET = [
    f"{key}={getattr(TINY, key)}"
    for key in ("d_model", "batch_size", "epochs", "max_length", "validation_users")
]
SHAPES = [
    SasrecSettings(
        d_model=16,
        heads=2,
        norm=norm,
        positions=positions,
        max_length=12,
        ffn=2,
        init_std=0.5,
        dropout=0.0,
    )
    for norm, positions in (("paper", "from-start"), ("pre", "from-end"), ("post", "from-start"))
]


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
    sequences: Sequences, settings: SasrecSettings = TINY, through: str = "n-2"
) -> list[bytes]:
    seen: list[bytes] = []
    train(
        sequences, settings, exclude_history=True, trained_through=through,
        on_epoch=lambda epoch, model: seen.append(weights_of(model)),
    )  # fmt: skip
    assert len(seen) == settings.epochs
    return seen


# The model.


class PlainSASRec(nn.Module):
    """Padded on the right, attention with a mask, one user a row: as one would write it down."""

    def __init__(self, ours: SASRec):
        super().__init__()
        self.settings, self.weights = ours.settings, dict(ours.named_parameters())

    def linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return F.linear(values, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            values, values.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )

    def attention(self, name: str, asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        width, heads = self.settings.d_model, self.settings.heads
        query, key, value = (
            self.linear(f"{name}.{kind}", of)
            .view(*of.shape[:2], heads, width // heads)
            .transpose(1, 2)
            for kind, of in (("query", asking), ("key", asked), ("value", asked))
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(width // heads)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        return self.linear(f"{name}.out", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def feed_forward(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{name}.narrow", self.linear(f"{name}.widen", values).relu())

    def forward(self, items_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        how = self.settings.norm
        places = torch.arange(items_BL.shape[1])[None]
        if self.settings.positions == "from-end":
            places = (lengths_B[:, None] - 1 - places).clamp(min=0)
        hidden = F.embedding(items_BL, self.weights["item_embedding.weight"]) * math.sqrt(
            self.settings.d_model
        )
        hidden = hidden + F.embedding(places, self.weights["position_embedding.weight"])
        if how == "post":
            hidden = self.norm("norm", hidden)
        for layer in range(self.settings.layers):
            name = f"blocks.{layer}"
            if how == "post":
                hidden = self.norm(
                    f"{name}.attention_norm", hidden + self.attention(name, hidden, hidden)
                )
                hidden = self.norm(f"{name}.ffn_norm", hidden + self.feed_forward(name, hidden))
            elif how == "pre":
                normed = self.norm(f"{name}.attention_norm", hidden)
                hidden = hidden + self.attention(name, normed, normed)
                hidden = hidden + self.feed_forward(name, self.norm(f"{name}.ffn_norm", hidden))
            else:
                normed = self.norm(f"{name}.attention_norm", hidden)
                normed = self.norm(
                    f"{name}.ffn_norm", normed + self.attention(name, normed, hidden)
                )
                hidden = normed + self.feed_forward(name, normed)
        if how != "post":
            hidden = self.norm("norm", hidden)
        return hidden @ self.weights["item_embedding.weight"].T


def plain_loss(model: SASRec, sequences: Sequences) -> torch.Tensor:
    parts = [
        sequences.items[start : end - 2][-model.settings.max_length - 1 :].tolist()
        for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    ]
    parts = [part for part in parts if len(part) > 1]
    longest = max(map(len, parts))
    items_BL = torch.tensor([part[:-1] + [0] * (longest - len(part)) for part in parts])
    labels_BL = torch.tensor([part[1:] + [-100] * (longest - len(part)) for part in parts])
    logits = PlainSASRec(model)(items_BL, torch.tensor([len(part) - 1 for part in parts]))
    return F.cross_entropy(
        logits.flatten(0, 1),
        labels_BL.flatten(),
        ignore_index=-100,
        label_smoothing=model.settings.label_smoothing,
    )


@pytest.mark.parametrize("settings", SHAPES, ids=lambda settings: settings.norm)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_equal_a_plain_padded_model(
    settings: SasrecSettings, smoothing: float
) -> None:
    sequences = made()
    settings = SasrecSettings(
        **{**vars(settings), "label_smoothing": smoothing, "precision": "fp32", "batch_size": 100}
    )
    model = made_model(sequences, settings)
    ((packed, labels_n),) = TrainingParts(sequences, settings, "n-2").batches(1)
    losses, gradients = [], []
    for loss in (model.loss(packed, labels_n), plain_loss(model, sequences)):
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0 or name.endswith("key.bias"), (
            name
        )  # softmax does not see a key's bias
        assert (gradients[0][name] - expected).abs().max() <= 1e-5, name


def test_the_softmax_in_bf16_is_near() -> None:
    sequences = made(300, 500)
    losses = []
    for precision in ("fp32", "bf16"):
        settings = SasrecSettings(
            **{**vars(SHAPES[0]), "precision": precision, "batch_size": 300, "init_std": 0.1}
        )
        ((packed, labels_n),) = TrainingParts(sequences, settings, "n-2").batches(1)
        losses.append(float(made_model(sequences, settings).loss(packed, labels_n).detach()))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("settings", SHAPES, ids=lambda settings: settings.norm)
def test_a_later_item_changes_no_earlier_state(settings: SasrecSettings) -> None:
    sequences = made()
    model = made_model(sequences, settings).eval()
    ends_B, lengths_B = np.array([40, 9, 23]), np.array([8, 9, 5])
    other = sequences.items.copy()
    other[[37, 8, 21]] = (other[[37, 8, 21]] + 1) % sequences.num_items
    packed = pack(sequences.items, ends_B, lengths_B, settings)
    with torch.inference_mode():
        before, after = (
            model.states(pack(items, ends_B, lengths_B, settings))
            for items in (sequences.items, other)
        )
    reached = np.isin(packed.places_n, [37, 38, 39, 8, 21, 22])
    same = (before == after).all(1).numpy()
    assert same[~reached].all()
    assert not same[reached].any()
    assert reached.sum() == 6


def test_inputs_are_the_newest_items_in_the_order_asked_for() -> None:
    settings = SasrecSettings(max_length=4, positions="from-end")
    packed = pack(np.arange(100, 120), np.array([7, 10, 20]), np.array([7, 2, 3]), settings)
    assert packed.items_n.tolist() == [108, 109, 117, 118, 119, 103, 104, 105, 106]
    assert packed.positions_n.tolist() == [1, 0, 2, 1, 0, 3, 2, 1, 0]
    assert packed.items_n[packed.last_B].tolist() == [106, 109, 119]
    packed = pack(
        np.arange(100, 120), np.array([7, 10]), np.array([7, 2]), SasrecSettings(max_length=4)
    )
    assert packed.positions_n.tolist() == [0, 1, 0, 1, 2, 3]


def pairs_of(packed: Packed, labels_n: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(packed.items_n.tolist(), labels_n.tolist(), strict=True))


@pytest.mark.parametrize(("through", "held_out"), [("n-2", 2), ("n-1", 1)])
def test_an_epoch_asks_for_each_item_of_a_training_part_once(through: str, held_out: int) -> None:
    sequences, settings = made(), SasrecSettings(batch_size=7, max_length=6)
    parts = TrainingParts(sequences, settings, through)
    expected = []
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:] - held_out, strict=True):
        part = sequences.items[start:end][-7:].tolist()
        expected += list(itertools.pairwise(part))
    epochs = [
        [pair for batch in parts.batches(epoch) for pair in pairs_of(*batch)] for epoch in (1, 2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1]


# Training.


def test_training_reads_no_held_out_item() -> None:
    sequences = made()
    assert weights_by_epoch(sequences) == weights_by_epoch(changed(sequences, (1, 2)))
    assert weights_by_epoch(sequences) != weights_by_epoch(changed(sequences, (3,)))


def test_a_refit_reads_the_validation_item_and_no_test_item() -> None:
    sequences = made()
    assert weights_by_epoch(sequences, through="n-1") == weights_by_epoch(
        changed(sequences, (1,)), through="n-1"
    )
    assert weights_by_epoch(sequences, through="n-1") != weights_by_epoch(
        changed(sequences, (2,)), through="n-1"
    )


def test_test_items_do_not_choose_the_epoch() -> None:
    sequences = made()
    ours, others = (
        train(data, TINY, exclude_history=True) for data in (sequences, changed(sequences, (1,)))
    )
    assert weights_of(ours.model) == weights_of(others.model)
    assert (ours.best.epoch, ours.best.scores) == (others.best.epoch, others.best.scores)


def test_a_seed_gives_one_run_and_leaves_the_callers_dice_alone() -> None:
    sequences = made()
    settings = SasrecSettings(**{**vars(TINY), "attention_dropout": 0.2, "average": 0.9})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights_by_epoch(sequences, settings)
    assert torch.equal(torch.rand(3), expected)
    assert first == weights_by_epoch(sequences, settings)
    assert first != weights_by_epoch(sequences, SasrecSettings(**{**vars(settings), "seed": 1}))


def next_door(num_users: int = 200, num_items: int = 50) -> Sequences:
    """Who took item i takes i + 1 next."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 12, num_users)
    first = rng.integers(0, num_items, num_users)
    items = [
        f"{(first[u] + k) % num_items:02d}" for u in range(num_users) for k in range(lengths[u])
    ]
    return sequences_from_ids([f"u{user}" for user in range(num_users)], lengths, items)


def test_it_learns_what_popularity_cannot() -> None:
    sequences = next_door()
    settings = SasrecSettings(
        d_model=16,
        batch_size=32,
        learning_rate=1e-2,
        epochs=12,
        max_length=12,
        dropout=0.1,
        validation_users=100,
    )
    trained = train(sequences, settings, exclude_history=True)
    rows = np.arange(sequences.num_users)
    places = target_places(trained.model, sequences.history_and_target("test"), rows, True)
    popular = baseline.recommend(
        "popularity", sequences, sequences.item_ids, "test", exclude_history=True
    )
    past = histories(sequences, "test")
    assert (places == 1).mean() > 0.9
    assert (popular.ranks(past.targets_U) == 1).mean() < 0.1
    assert trained.best.users == 100
    assert trained.best.scores["NDCG@10"] > 0.9


def test_patience_ends_training_and_the_best_weights_are_kept() -> None:
    sequences = made()
    seen: list[tuple[Epoch, bytes]] = []
    settings = SasrecSettings(**{**vars(TINY), "epochs": 40, "patience": 2, "learning_rate": 1e-2})
    trained = train(
        sequences,
        settings,
        exclude_history=True,
        on_epoch=lambda epoch, model: seen.append((epoch, weights_of(model))),
    )
    epochs = [epoch for epoch, _ in seen]
    best = max(epochs, key=lambda epoch: epoch.scores["NDCG@10"])
    assert trained.best == best
    assert [epoch for epoch in epochs if epoch.best][-1] == best
    assert trained.last.epoch == len(epochs) == best.epoch + 2 < 40
    assert weights_of(trained.model) == seen[best.epoch - 1][1] != seen[-1][1]


def test_the_average_is_what_is_validated_and_kept() -> None:
    sequences = made()

    def trained(average: float) -> Trained:
        settings = SasrecSettings(
            **{**vars(TINY), "epochs": 1, "average": average, "batch_size": 8}
        )
        return train(sequences, settings, exclude_history=True)

    plain, averaged = trained(0.0), trained(0.99)
    assert plain.best.loss == averaged.best.loss
    assert weights_of(plain.model) != weights_of(averaged.model)
    rows = np.arange(sequences.num_users)
    places = target_places(averaged.model, sequences.history_and_target("validation"), rows, True)
    assert (places <= 10).mean() == averaged.best.scores["HR@10"]


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    settings = SasrecSettings(**{**vars(TINY), "learning_rate": 1e30})
    with pytest.raises(NotFinite, match="lower learning_rate"):
        train(made(), settings, exclude_history=True)


# Lists.


@pytest.mark.parametrize("exclude", [True, False])
def test_lists_are_the_best_scores_without_the_whole_history(
    exclude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genrec_dist.baselines.sasrec_model.SCORES_AT_ONCE", 7 * 40)
    sequences = made()
    settings = SasrecSettings(**{**vars(SHAPES[1]), "max_length": 5})
    model = made_model(sequences, settings)
    rows = np.array([31, 2, 59, 7, 40, 1, 18, 5, 44])
    lists = rule_of(model, sequences, "test", exclude_history=exclude)(rows)
    view = sequences.history_and_target("test")
    plain = PlainSASRec(model)
    for place, user in enumerate(rows):
        past = view.items[view.starts[user] : view.ends[user]]
        window = torch.from_numpy(past[-5:].astype(np.int64))[None]
        scores = plain(window, torch.tensor([window.shape[1]]))[0, -1].detach().numpy()
        if exclude:
            scores[past] = -np.inf
        best = np.argsort(-scores)[:20]
        best = best[np.isfinite(scores[best])]
        listed = lists.items_UN[place]
        assert listed[listed >= 0].tolist() == best.tolist()
        np.testing.assert_allclose(
            lists.scores_UN[place][: len(best)], scores[best], rtol=1e-4, atol=1e-4
        )
        assert not exclude or not set(listed) & set(past.tolist())
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


def prepared(folder: Path, sequences: Sequences) -> Dataset:
    bounds = zip(sequences.user_ids, sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    lines = [
        " ".join([user, *(f"item-{row}" for row in sequences.items[start:end])]) for user, start, end in bounds
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("\n".join(lines))
    return prepare(folder / "log.txt", folder / "prepared", numbering="random")


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, scored on validation."""
    path = tmp_path_factory.mktemp("run") / "sasrec"
    run_baseline("sasrec", dataset, "validation", path, settings=TINY_SET)
    return path


def test_a_run_leaves_what_it_did(run: Path, dataset: Dataset) -> None:
    names = {path.name for path in run.iterdir()} - {"metrics-test.json", "top20-test.parquet"}
    assert names == {
        *("sasrec.yaml", "events.jsonl", "best.safetensors", "item_vectors.safetensors"),
        *("metrics-validation.json", "top20-validation.parquet"),
    }
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "epoch", "epoch", "end"]
    epochs = events[1:-1]
    assert {"epoch", "loss", "HR@10", "NDCG@10", "seconds", "users", "best", "step"} <= set(
        epochs[0]
    )
    assert epochs[0]["loss"] > epochs[-1]["loss"]
    assert 0 < epochs[0]["seconds"] < epochs[-1]["seconds"]
    metrics = json.loads((run / "metrics-validation.json").read_text())
    best = max(epochs, key=lambda event: event["NDCG@10"])
    assert metrics["NDCG@10"] == best["NDCG@10"]
    assert metrics["HR@10"] == best["HR@10"]
    assert (metrics["system"], metrics["recipe"]["best_epoch"], metrics["recipe"]["d_model"]) == (
        "sasrec",
        best["epoch"],
        16,
    )
    assert metrics["protocol"]["exclude_history"] is True
    assert set(metrics["beside"]) == {"counting", "popularity", "knn"}
    with (
        safe_open(run / "item_vectors.safetensors", "np") as file,
        safe_open(run / "best.safetensors", "np") as best_file,
    ):
        vectors, metadata = file.get_tensor("item_vectors"), file.metadata()
        assert np.array_equal(vectors, best_file.get_tensor("item_embedding.weight"))
    assert (vectors.shape, vectors.dtype) == ((dataset.sequences.num_items, 16), np.float32)
    assert metadata["sequences_hash"] == dataset.info.sequences_hash
    assert metadata["trained_through"] == "n-2"
    assert sasrec_settings(json.loads(metadata["settings"])) == sasrec_settings({}, TINY_SET)


def test_a_finished_run_is_scored_again_and_not_trained_again(run: Path, dataset: Dataset) -> None:
    before = {
        name: (run / name).stat().st_mtime_ns
        for name in ("events.jsonl", "best.safetensors", "sasrec.yaml")
    }
    trained: list[Epoch] = []
    metrics = run_baseline("sasrec", dataset, "test", run, on_epoch=trained.append)
    assert (
        run_baseline(
            "sasrec", dataset, "test", run, settings=["d_model=16"], exclude_history=False
        )["users"]
        == 60
    )
    again = run_baseline("sasrec", dataset, "test", run, settings=TINY_SET)
    assert not trained
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}
    assert again["NDCG@20"] == metrics["NDCG@20"]
    view = dataset.sequences.history_and_target("test")
    model = open_or_train(run, dataset, "test", exclude_history=True).model
    places = target_places(model, view, np.arange(60), True)
    assert metrics["HR@10"] == pytest.approx((places <= 10).mean())


def test_the_same_command_leaves_the_same_weights(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')  # of a run that was interrupted
    run_baseline("sasrec", dataset, "validation", tmp_path, settings=TINY_SET)
    for name in ("sasrec.yaml", "top20-validation.parquet"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name
    for name in ("best.safetensors", "item_vectors.safetensors"):
        # Not byte by byte: safetensors writes the keys of its metadata in any order.
        ours, others = (stored(path / name) for path in (tmp_path, run))
        assert ours == others, name
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 5


class Interrupted(Exception):
    pass


def interrupted_at(
    number: int, dataset: Dataset, out: Path, settings: list[str], **more: str
) -> None:
    """A training that ends when it has told of this epoch, before it has kept it."""

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == number:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_baseline("sasrec", dataset, "test", out, settings=settings, on_epoch=stop, **more)
    assert not (out / "best.safetensors").exists()


SLOW_SET = [
    *TINY_SET,
    "epochs=6",
    "attention_dropout=0.2",
    "dropout=0.3",
    "weight_decay=0.1",
    "learning_rate=0.01",
]


@pytest.mark.parametrize(
    ("more", "through"),
    [(["average=0.9", "patience=2"], "n-2"), (["average=0"], "n-2"), (["average=0.9"], "n-1")],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(
    more: list[str], through: str, dataset: Dataset, tmp_path: Path
) -> None:
    settings = [*SLOW_SET, *more]
    whole = run_baseline(
        "sasrec", dataset, "test", tmp_path / "whole", settings=settings, trained_through=through
    )
    for number in (2, 4):  # in the second epoch, and once more
        interrupted_at(number, dataset, tmp_path / "parts", settings, trained_through=through)
    seen: list[Epoch] = []
    again = run_baseline(
        "sasrec",
        dataset,
        "test",
        tmp_path / "parts",
        settings=settings,
        trained_through=through,
        on_epoch=seen.append,
    )
    assert seen[0].epoch == 4
    assert again["recipe"] == whole["recipe"]
    for name in ("best.safetensors", "item_vectors.safetensors"):
        assert stored(tmp_path / "parts" / name) == stored(tmp_path / "whole" / name), name
    assert not (tmp_path / "parts" / "training.safetensors").exists()
    ours, others = (epochs_without_times(tmp_path / name) for name in ("parts", "whole"))
    assert ours == others
    events = [
        json.loads(line) for line in (tmp_path / "parts" / "events.jsonl").read_text().splitlines()
    ]
    assert [event["resumed_from"] for event in events if event["event"] == "start"] == [None, 1, 3]
    seconds = [event["seconds"] for event in events if event["event"] == "epoch"]
    assert seconds == sorted(seconds)


def epochs_without_times(run: Path) -> list[dict]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end"
    return [
        {key: value for key, value in event.items() if key not in ("time", "seconds")}
        for event in events
        if event["event"] == "epoch"
    ]


def test_a_training_whose_weights_were_not_written_at_the_end_only_writes_them(
    dataset: Dataset, tmp_path: Path
) -> None:
    settings = [*SLOW_SET, "average=0.9"]
    run_baseline("sasrec", dataset, "test", tmp_path / "whole", settings=settings)
    (tmp_path / "cut").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "genrec_dist.baselines.sasrec_run._save", lambda *_: (_ for _ in ()).throw(Interrupted)
        )
        with pytest.raises(Interrupted):
            run_baseline("sasrec", dataset, "test", tmp_path / "cut", settings=settings)
    seen: list[Epoch] = []
    run_baseline(
        "sasrec", dataset, "test", tmp_path / "cut", settings=settings, on_epoch=seen.append
    )
    assert not seen
    assert stored(tmp_path / "cut" / "best.safetensors") == stored(
        tmp_path / "whole" / "best.safetensors"
    )
    assert epochs_without_times(tmp_path / "cut") == epochs_without_times(tmp_path / "whole")


def test_what_is_not_the_interrupted_training_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    interrupted_at(2, dataset, tmp_path / "run", TINY_SET)
    other = prepared(tmp_path, changed(made(), (1,)))
    for arguments, said in [
        (
            {"settings": [*TINY_SET, "dropout=0.1"]},
            "interrupted training with settings .*choose another --out",
        ),
        (
            {"dataset": other},
            "interrupted training with sequences_hash .*remove it to train from the start",
        ),
        ({"exclude_history": False}, "interrupted training with exclude_history true, not false"),
        ({"trained_through": "n-1"}, "interrupted training with trained_through n-2, not n-1"),
    ]:
        asked = {
            "name": "sasrec",
            "dataset": dataset,
            "split": "test",
            "out_dir": tmp_path / "run",
            "settings": TINY_SET,
        }
        with pytest.raises(ValueError, match=said) as error:
            run_baseline(**{**asked, **arguments})
        assert "\n" not in str(error.value)
    kept = tmp_path / "run" / "training.safetensors"
    kept.write_bytes(kept.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"training.safetensors: not readable .*remove it to train from the start"
    ):
        run_baseline("sasrec", dataset, "test", tmp_path / "run", settings=TINY_SET)


def stored(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def test_a_refit_trains_all_its_epochs(dataset: Dataset, tmp_path: Path) -> None:
    metrics = run_baseline(
        "sasrec",
        dataset,
        "test",
        tmp_path,
        trained_through="n-1",
        settings=[*TINY_SET, "patience=1"],
    )
    assert metrics["recipe"]["best_epoch"] == 3
    assert metrics["protocol"]["trained_through"] == "n-1"
    epochs = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()][
        1:-1
    ]
    assert [("NDCG@10" in epoch, epoch["users"]) for epoch in epochs] == [(False, 0)] * 3


def test_what_another_run_or_other_data_left_is_refused(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    other = prepared(tmp_path, changed(made(), (1,)))
    for arguments, said in [
        ({"dataset": other}, "was trained on sequences .*choose another --out"),
        ({"settings": ["d_model=8"]}, "was trained with d_model 16, not 8: choose another --out"),
        (
            {"trained_through": "n-1", "settings": ["epochs=3"]},
            "trained through n-2: pass --trained-through n-2",
        ),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            run_baseline(
                **{
                    "name": "sasrec",
                    "dataset": dataset,
                    "split": "test",
                    "out_dir": run,
                    **arguments,
                }
            )
        assert "\n" not in str(error.value)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"best.safetensors: not readable .*train again"):
        run_baseline("sasrec", dataset, "test", torn)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "validation", "trained_through": "n-1"}, "n-1 has seen the validation targets"),
        ({"trained_through": "n-1"}, "give --set epochs=N"),
        ({"settings": ["width=3"]}, "sasrec: unknown key width; known here: d_model"),
        ({"settings": ["d_model=wide"]}, "sasrec: d_model: 'wide' is not of type int"),
        ({"settings": ["norm=none"]}, "sasrec: norm: 'none' is none of paper, pre, post"),
        ({"settings": ["d_model=9", "heads=2"]}, "sasrec: d_model 9 is no multiple of heads 2"),
        (
            {"settings": ["dropout=1"]},
            "sasrec: dropout is 1.0: it has to be 0 or above and below 1",
        ),
        ({"settings": ["epochs=0"]}, "sasrec: epochs is 0: it has to be 1 or above"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_nothing_written(
    arguments: dict, said: str, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        run_baseline(
            **{
                "name": "sasrec",
                "dataset": dataset,
                "split": "test",
                "out_dir": tmp_path / "run",
                **arguments,
            }
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_users_with_nothing_to_learn_from_are_told() -> None:
    sequences = sequences_from_ids(["u", "v"], [3, 3], ["a", "b", "c", "c", "b", "a"])
    with pytest.raises(ValueError, match="no user has two items to train on"):
        train(sequences, TINY, exclude_history=True)
    assert train(sequences, TINY, exclude_history=True, trained_through="n-1").best.epoch == 3


def test_the_defaults_are_settings() -> None:
    check_settings(SasrecSettings(), "defaults")
    assert sasrec_settings({}) == SasrecSettings()


def test_the_command_trains_scores_and_is_told_what_it_may_not(
    tiny_data: Path, tmp_path: Path
) -> None:
    words = [word for text in TINY_SET for word in ("--set", text)]
    command = [
        "baseline",
        "sasrec",
        str(tiny_data),
        "--out",
        str(tmp_path / "run"),
        "--split",
        "validation",
    ]
    done = CliRunner().invoke(app, [*command, *words])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("epoch ") == 3
    assert all(system in done.stdout for system in ("sasrec", "knn", "popularity"))
    wrong = CliRunner().invoke(
        app,
        [
            "baseline",
            "popularity",
            str(tiny_data),
            "--out",
            str(tmp_path / "other"),
            "--set",
            "d_model=8",
        ],
    )
    assert wrong.exit_code == 2
    assert not (tmp_path / "other").exists()
