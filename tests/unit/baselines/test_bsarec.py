"""BSARec against the equations of its paper, written down row by row with transforms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.prepare import prepare
from genrec_shards.sequences import sequences_from_ids
from random_sequences import random_sequences
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec.bsarec import BSARec, BsarecSettings
from genrec_dist.baselines.sasrec.model import SASRec, pack
from genrec_dist.baselines.sasrec.run import sasrec_settings
from genrec_dist.baselines.sasrec.train import Epoch, TrainingParts, model_of, train
from genrec_dist.data.samples.soft_targets import Teacher

TINY = BsarecSettings(
    d_model=8, heads=2, max_length=9, batch_size=64, epochs=2, precision="fp32", c=3, alpha=0.6
)
STILL = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0, init_std=0.3)
TINY_SET = [f"{key}={getattr(TINY, key)}" for key in ("d_model", "max_length", "epochs", "c")]


def state_of_row(model: BSARec, items: list[int]) -> Tensor:
    """The state after the last item of one sequence: equations 2 to 10 of arXiv 2312.10325, with
    `torch.fft` over the padded row and one head at a time."""
    settings, weights = model.settings, dict(model.state_dict())
    assert isinstance(settings, BsarecSettings)
    length, width, heads = settings.max_length, settings.d_model, settings.heads
    num_padding = length - len(items)

    def norm(values: Tensor, name: str) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(values: Tensor, name: str) -> Tensor:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    rows = [weights["padding_d"]] * num_padding
    rows += [weights["item_embedding.weight"][item] for item in items]
    hidden = norm(torch.stack(rows) + weights["position_embedding.weight"], "norm")
    for layer in range(settings.layers):
        name = f"blocks.{layer}"
        spectrum = torch.fft.rfft(hidden, dim=0, norm="ortho")
        spectrum[settings.c // 2 + 1 :] = 0
        low = torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho")
        filtered = low + weights[f"{name}.sqrt_beta_d"].pow(2) * (hidden - low)
        filtered = norm(filtered + hidden, f"{name}.filter_norm")
        query, key, value = (linear(hidden, f"{name}.{kind}") for kind in ("query", "key", "value"))
        read = torch.zeros(length, width)
        size = width // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for at in range(length):
                scores = key[:, part] @ query[at, part] / size**0.5
                for other in range(length):
                    if other > at or other < num_padding:
                        scores[other] -= 10_000
                read[at, part] = torch.softmax(scores, 0) @ value[:, part]
        attended = norm(linear(read, f"{name}.out") + hidden, f"{name}.attention_norm")
        mixed = settings.alpha * filtered + (1 - settings.alpha) * attended
        fed = linear(F.gelu(linear(mixed, f"{name}.widen")), f"{name}.narrow")
        hidden = norm(fed + mixed, f"{name}.ffn_norm")
    return hidden[-1]


def made_model(num_items: int, settings: BsarecSettings = STILL) -> BSARec:
    """Weights and biases at random: one that is left out is seen."""
    torch.manual_seed(3)
    model = model_of(num_items, settings)
    assert isinstance(model, BSARec)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model


@pytest.mark.parametrize("settings", [STILL, dataclasses.replace(STILL, alpha=0.1, c=6, heads=1)])
def test_bsarec_equals_the_papers_equations(settings: BsarecSettings) -> None:
    sequences = random_sequences(num_users=12, num_items=30)
    model = made_model(sequences.num_items, settings)
    ends, lengths = sequences.offsets[1:], sequences.lengths
    assert lengths.min() < settings.max_length < lengths.max()
    packed = pack(sequences.items, ends, lengths, settings)
    with torch.no_grad():
        scores = model.scores(packed)
        for user, end in enumerate(ends):
            start = max(sequences.offsets[user], end - settings.max_length)
            state = state_of_row(model, sequences.items[start:end].tolist())
            expected = model.item_embedding.weight @ state
            torch.testing.assert_close(scores[user], expected, rtol=1e-4, atol=1e-4)


def test_each_prefix_is_a_row_with_the_next_item_as_its_label() -> None:
    sequences = sequences_from_ids(
        ["u", "v", "w"], [6, 3, 14], [*"abcdef", *"bca", *"hgfedcbaijklmn"]
    )
    # After the prefixes of their training parts: 3 of u's four items, none of v's one, 11 of w's.
    teacher = Teacher(
        np.array([0, 3, 3]), np.zeros((14, 1), np.int32), np.zeros((14, 1), np.float32)
    )
    # The shortest row of padding alone has a first item to learn; it has no soft targets.
    for given, shortest in ((None, 1), (teacher, 2)):
        parts, found = TrainingParts(sequences, TINY, "n-2", given), set()
        for packed, labels_B, soft in parts.batches(epoch=1):
            assert (soft is None) == (given is None)
            offsets = packed.attended.queries.offsets
            for row, label in enumerate(labels_B.tolist()):
                items = packed.items_n[offsets[row] : offsets[row + 1]].tolist()
                found.add("".join(sequences.item_ids[item] for item in [*items, label]))
        # Of w's training part, hgfedcbaijkl, the last nine; v has one item to train on: no row.
        own = {"abcd"[:end] for end in range(shortest, 5)}
        assert found == own | {"edcbaijkl"[:end] for end in range(shortest, 10)}
        assert len(parts.lengths_U) == len(found)


def test_the_loss_is_the_mean_over_rows_of_the_softmax_over_all_items() -> None:
    sequences = random_sequences(num_users=12, num_items=30)
    model = made_model(sequences.num_items)
    packed, labels_B, _ = next(TrainingParts(sequences, STILL, "n-2").batches(epoch=1))
    losses = []
    offsets = packed.attended.queries.offsets
    with torch.no_grad():
        for row, label in enumerate(labels_B.tolist()):
            items = packed.items_n[offsets[row] : offsets[row + 1]].tolist()
            logits = model.item_embedding.weight @ state_of_row(model, items)
            losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
        found = float(model.loss(packed, labels_B))
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_held_out_items_move_no_weight_and_training_lowers_the_loss() -> None:
    sequences = random_sequences(num_users=30, num_items=20)
    items = sequences.items.copy()
    for back in (1, 2):
        items[sequences.offsets[1:] - back] = 0
    changed = dataclasses.replace(sequences, items=items)
    settings = dataclasses.replace(TINY, epochs=3, learning_rate=0.01)
    found: list[list[tuple[float, dict[str, Tensor]]]] = [[], []]
    for data, seen in zip((sequences, changed), found, strict=True):

        def keep(epoch: Epoch, model: SASRec, seen: list = seen) -> None:
            state = model.state_dict()
            seen.append((epoch.loss, {name: state[name].clone() for name in state}))

        train(data, settings, exclude_history=False, on_epoch=keep)
    losses = [loss for loss, _ in found[0]]
    assert losses == [loss for loss, _ in found[1]]
    assert losses == sorted(losses, reverse=True)
    for (_, ours), (_, theirs) in zip(*found, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_baseline_trains_it_once_and_no_other_system_takes_its_run(tmp_path: Path) -> None:
    lines = [
        f"u{n} " + " ".join(f"i{(n * 7 + k * (n % 3 + 1)) % 40}" for k in range(3 + n % 9))
        for n in range(40)
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    dataset = prepare(tmp_path / "log.txt", tmp_path / "data")
    out = tmp_path / "run"
    first = run_baseline("bsarec", dataset, "test", out, settings=TINY_SET)
    weights = (out / "best.safetensors").stat().st_mtime_ns
    again = run_baseline("bsarec", dataset, "test", out)
    assert (out / "best.safetensors").stat().st_mtime_ns == weights
    assert (again["NDCG@20"], again["recipe"]) == (first["NDCG@20"], first["recipe"])
    assert first["recipe"]["alpha"] == BsarecSettings.alpha
    assert first["system"] == "bsarec"
    # A run of before first items were learned.
    with safe_open(out / "best.safetensors", "pt") as file:
        old = {**file.metadata(), "format_version": "1"}
        save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "old", old)  # noqa: SIM118
    (out / "best.safetensors").rename(tmp_path / "new")
    (tmp_path / "old").rename(out / "best.safetensors")
    with pytest.raises(ValueError, match="format 1, bsarec has 2 now: choose another --out"):
        run_baseline("bsarec", dataset, "test", out)
    (tmp_path / "new").rename(out / "best.safetensors")
    with pytest.raises(ValueError, match="is of bsarec, not sasrec: choose another --out"):
        run_baseline("sasrec", dataset, "test", out)
    with pytest.raises(ValueError, match=r"alpha is 1\.5: it has to be from 0 to 1"):
        sasrec_settings({"alpha": 1.5}, system="bsarec")
