"""SASRec with the items' texts and soft targets, GenRec's control: what they add to the loss, that
lists need no texts afterwards, and its run directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import Dataset, load_dataset
from safetensors import safe_open
from topic_data import write_data
from torch.nn import functional as F

from genrec_dist.baselines.sasrec.bsarec import BSARec, BsarecSettings
from genrec_dist.baselines.sasrec.model import SASRec, SasrecSettings, pack
from genrec_dist.baselines.sasrec.run import WEIGHTS, Training, open_or_train, sasrec_settings
from genrec_dist.baselines.sasrec.train import TrainingParts
from genrec_dist.config.recipe import Distill
from genrec_dist.data.batch import SoftTargets
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.model.item_rows import item_text_of

SMALL = SasrecSettings(
    d_model=16, batch_size=16, epochs=3, max_length=12, dropout=0.2, precision="fp32"
)
WITH_BOTH = [
    "d_model=16", "batch_size=16", "epochs=3", "max_length=12", "validation_users=0",
    "init_items=cooccurrence", "item_text=add", "distill.weight=0.4", "distill.top=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_data(tmp_path_factory.mktemp("texts")))


def numbered_teacher(dataset: Dataset) -> Teacher:
    """Of each prefix the one item whose row is the place of its target in the data's flat array,
    modulo the number of items."""
    sequences = dataset.sequences
    ends_U = sequences.training_ends("n-2")
    places = [
        np.arange(first + 1, end) for first, end in zip(sequences.offsets[:-1], ends_U, strict=True)
    ]
    first_U = np.cumsum([0, *map(len, places)])[:-1]
    items_SK = (np.concatenate(places) % sequences.num_items)[:, None].astype(np.int32)
    return Teacher(first_U, items_SK, np.full(items_SK.shape, 0.25, np.float32))


@pytest.mark.parametrize("settings", [SMALL, BsarecSettings(d_model=16, max_length=12)])
def test_each_label_has_the_soft_targets_of_its_own_prefix(
    dataset: Dataset, settings: SasrecSettings
) -> None:
    parts = TrainingParts(dataset.sequences, settings, "n-2", numbered_teacher(dataset))
    seen = 0
    for packed, labels_n, soft in parts.batches(1):
        assert soft is not None
        places_n = packed.places_n
        if isinstance(settings, BsarecSettings):
            places_n = places_n[packed.attended.queries.offsets[1:] - 1]
        expected_n = (places_n + 1) % dataset.sequences.num_items
        assert soft.tokens_nK[:, 0].tolist() == expected_n.tolist()
        seen += len(labels_n)
    assert seen > 100


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_take_their_shares_of_the_label(dataset: Dataset, smoothing: float) -> None:
    settings = dataclasses.replace(SMALL, dropout=0.0, label_smoothing=smoothing)
    torch.manual_seed(0)
    model = SASRec(dataset.sequences.num_items, dataclasses.replace(settings, init_std=0.5))
    model = model.double()
    packed, labels_n, _ = next(TrainingParts(dataset.sequences, settings, "n-2").batches(1))
    tokens_nK = torch.randint(dataset.sequences.num_items, (len(labels_n), 3))
    soft = SoftTargets(tokens_nK, torch.tensor([0.2, 0.1, 0.05]).expand(len(labels_n), -1))
    logits_nI = model.states(packed, model.item_rows()) @ model.item_rows().T
    targets_nI = F.one_hot(labels_n, logits_nI.shape[1]).double() * (1 - 0.35)
    targets_nI = targets_nI.scatter_add(1, tokens_nK, soft.shares_nK.double())
    # Smoothing is a share of its own, as `F.cross_entropy` counts it.
    smoothed_n = F.cross_entropy(logits_nI, labels_n, reduction="none", label_smoothing=smoothing)
    plain_n = F.cross_entropy(logits_nI, labels_n, reduction="none")
    expected = (
        F.cross_entropy(logits_nI, targets_nI, reduction="none") - plain_n + smoothed_n
    ).mean()
    model.settings = settings
    assert float(model.loss(packed, labels_n, soft).detach()) == pytest.approx(
        float(expected.detach()), abs=1e-6
    )


def test_texts_are_in_both_tables_and_an_item_never_trained_has_its_text_alone(
    dataset: Dataset,
) -> None:
    num_items = dataset.sequences.num_items
    rng = np.random.default_rng(0)
    vectors_IF = rng.normal(size=(num_items, 5)).astype(np.float32)
    trained_I = np.arange(num_items) != 3
    for kind, settings in ((SASRec, SMALL), (BSARec, BsarecSettings(d_model=16, max_length=12))):
        model = kind(num_items, settings).eval()  # type: ignore[arg-type]
        own_Id = model.item_embedding.weight.detach().clone()
        model.item_text = item_text_of(
            own_Id, torch.arange(num_items), vectors_IF, trained_I, None, 0.5
        )
        text_Id = torch.from_numpy(vectors_IF) @ model.item_text.projection_FD
        items, lengths = dataset.sequences.items[:8], np.array([3, 5])
        packed = pack(items, np.cumsum(lengths), lengths, settings)
        with torch.no_grad():
            with_texts = model.scores(packed)
            model.take_texts_in()
            torch.testing.assert_close(model.scores(packed), with_texts)
        expected_Id = own_Id + text_Id
        expected_Id[3] = text_Id[3]
        torch.testing.assert_close(model.item_embedding.weight, expected_Id)
        assert not torch.equal(with_texts, kind(num_items, settings).eval().scores(packed))  # type: ignore[arg-type]


def trained(dataset: Dataset, out: Path, *overrides: str) -> bytes:
    training = Training(dataset, "test", exclude_history=True)
    run = open_or_train(out, training, [*WITH_BOTH, *overrides])
    return run.digest().encode()


def test_a_run_goes_on_to_the_same_bits_and_is_read_without_texts(
    dataset: Dataset, tmp_path: Path
) -> None:
    whole = trained(dataset, tmp_path / "whole")
    seen = []

    def stop(epoch: object) -> None:
        seen.append(epoch)
        if len(seen) == 2:
            raise KeyboardInterrupt

    training = Training(dataset, "test", exclude_history=True, on_epoch=stop)
    with pytest.raises(KeyboardInterrupt):
        open_or_train(tmp_path / "parts", training, WITH_BOTH)
    assert trained(dataset, tmp_path / "parts") == whole
    without = dataclasses.replace(dataset, descriptions=None)
    assert trained(without, tmp_path / "whole") == whole
    keys = {"item_embedding.weight", "position_embedding.weight"}
    with safe_open(tmp_path / "whole" / WEIGHTS, "pt") as file:
        held = set(file.keys())
        recorded = json.loads(file.metadata()["settings"])
    assert keys <= held
    assert not [name for name in held if "text" in name]
    assert recorded["distill"] == dataclasses.asdict(Distill(weight=0.4, top=7))
    with pytest.raises(ValueError, match=r"was trained with distill .*0\.4.*, not .*0\.3"):
        trained(dataset, tmp_path / "whole", "distill.weight=0.3")


@pytest.mark.parametrize("switch", ["item_text=none", "distill.weight=0", "text=none"])
def test_each_switch_changes_what_is_learned(dataset: Dataset, tmp_path: Path, switch: str) -> None:
    assert trained(dataset, tmp_path / "one") != trained(dataset, tmp_path / "other", switch)


def test_soft_targets_out_of_range_are_refused() -> None:
    for text, message in (
        ("distill.weight=1", "below 1"),
        ("distill.temperature=0", "above 0"),
        ("distill.top=0", "1 or above"),
        ("item_text=init", "item_text"),
    ):
        with pytest.raises(ValueError, match=message):
            sasrec_settings({}, [text])
