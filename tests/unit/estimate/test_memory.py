"""The predicted bytes against storages of real ranks and real micro-batches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import memory_rank
import numpy as np
import pytest
import torch
from cpu_model import model_on_cpu
from fake_cuda import FUSED, Watch
from genrec_kernels.sharded_rows import RowTable
from genrec_shards.numbering.item_text import text_vectors
from memory_rank import LiveBytes
from topic_data import write_data
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from two_ranks import start_each

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import SampleRows, SoftTargets
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.estimate.forecast import forecast, step_flops
from genrec_dist.estimate.memory.activations import Compute, MicroBatch, activation_bytes
from genrec_dist.estimate.memory.fit import GIB, usable
from genrec_dist.estimate.memory.state import (
    METHODS,
    State,
    gathered_elements,
    read_settings,
    state_bytes,
)
from genrec_dist.estimate.sizes import (
    ParameterCounts,
    TextSizes,
    build_config,
    count_parameters,
)
from genrec_dist.model.genrec import GenRecForConditionalGeneration, choose_loss
from genrec_dist.model.network import ItemText
from genrec_dist.text.vectors import FACTORS, vector_width
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup
from genrec_dist.training.step.micro_batches import memory_of

# 4.2 million parameters, so that paddings and scalars are small beside them.
RECIPE = """
data: nowhere
run: nowhere
model: {d_model: 256, encoder_layers: 1, decoder_layers: 1, heads: 4, ffn: 512, max_tokens: 64}
tokens: {vocab_size: 6000}
finetune: {epochs: 1}
optimizer: {ema_decay: 0.99}
"""
BUCKET = 200_000
CATEGORIES = ("weights", "masters", "moments", "gradients", "average", "buffers")
# DDP holds the same in both.
CASES = [(method, precision) for method in METHODS for precision in ("fp32", "bf16")]
CASES = [case for case in CASES if case not in (("ddp", "bf16"), ("zero3_offload", "fp32"))]
KINDS = {
    ("zero0", "fp32"): "AdamW",
    ("zero0", "bf16"): "FP16_UnfusedOptimizer",
    ("zero1", "bf16"): "BF16_Optimizer",
    ("zero3", "fp32"): "DeepSpeedZeroOptimizer_Stage3",
    ("zero3", "bf16"): "DeepSpeedZeroOptimizer_Stage3",
    ("zero3_offload", "fp32"): "DeepSpeedZeroOptimizer_Stage3",
    ("zero3_offload", "bf16"): "DeepSpeedZeroOptimizer_Stage3",
}


# Their gradients are summed in a copy at the end of the backward, which is not watched; the others
# copy in the step.
SUMMED_IN_A_COPY = {("zero0", "fp32"), ("zero1", "bf16")}


def zero_section(method: str) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": int(method[4]), "reduce_bucket_size": BUCKET}
    section["overlap_comm"] = False
    for name, methods in (("optimizer", METHODS[5:]), ("param", METHODS[6:])):
        if method in methods:
            section[f"offload_{name}"] = {"device": "cpu", "pin_memory": False}
    return section


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, and with a DeepSpeed file per method, as `launch/` has them."""
    path = tmp_path_factory.mktemp("memory")
    (path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for method in METHODS[1:]:
        section = {"zero_optimization": zero_section(method)}
        (path / f"{method}.json").write_text(json.dumps(section))
    return path


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every method in both precisions on two real ranks, one launch for all."""
    jobs = []
    for method, precision in CASES:
        settings = zero_section(method) if method != "ddp" else None
        jobs.append({"method": method, "precision": precision, "settings": settings})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks = start_each([memory_rank.__file__, folder / "jobs.json"], folder / "logs", timeout=550)
    assert not any(rank.returncode for rank in ranks), ranks[0].stderr[-3000:]
    results = json.loads((folder / "MEASURED.json").read_text())
    return dict(zip(CASES, results, strict=True))


def counts_of(folder: Path) -> ParameterCounts:
    recipe = load_recipe(folder / "recipe.yaml")
    return count_parameters(recipe, build_config(recipe, memory_rank.USERS, memory_rank.ITEMS))


def far_off(found: int, expected: int, whole: int = 0) -> bool:
    """More than 5 % off; of what is small beside the whole, more than half a percent of the
    whole."""
    return abs(found - expected) > max(0.05 * expected, 0.005 * whole)


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.parametrize(("method", "precision"), CASES)
def test_state_bytes_are_the_measured_ones(
    folder: Path, measured: Any, method: Any, precision: str
) -> None:
    """On two ranks, for the one that holds most; a prediction that is off by one copy of the
    weights would be found out."""
    result, counts, settings = measured[method, precision], counts_of(folder), None
    bf16 = precision == "bf16"
    settings = read_settings(folder, method)
    state = state_bytes(counts, method, 2, bf16, settings=settings, average=True)
    assert result["distributed_type"] == ("MULTI_CPU" if method == "ddp" else "DEEPSPEED")
    assert result["stage"] == (None if method == "ddp" else int(method[4]))
    assert result["optimizer"] == KINDS.get((method, precision), result["optimizer"])
    gathered = 0
    if method.startswith("zero3"):
        gathered = gathered_elements(counts, settings) * (2 if bf16 else 4)
    found = max(result["bytes"], key=lambda rank: rank["gradients"])
    total, expected = sum(found[name] for name in CATEGORIES), state.total - gathered + state.host
    assert not far_off(total, expected)
    one_copy = 4 * counts.dense // (1 if method in ("ddp", "zero0") else 2)
    assert far_off(total + one_copy, expected)
    assert far_off(total - one_copy, expected)
    assert not far_off(found["gathered"], gathered, state.total)
    if not method.endswith("offload"):  # on a CPU host and device are one
        for name in CATEGORIES:
            of_name = getattr(state, name) - (gathered if name == "buffers" else 0)
            assert not far_off(found[name], of_name, state.total), name
        if (method, precision) not in SUMMED_IN_A_COPY:
            copied = max(rank["step_extra"] for rank in result["bytes"])
            assert not far_off(copied, state.step_extra, state.total)


@contextlib.contextmanager
def micro_batch_loss(
    model: GenRecForConditionalGeneration,
    batch: MicroBatch,
    compute: Compute,
    soft: SoftTargets | None = None,
) -> Iterator[torch.Tensor]:
    """The loss of a target token."""
    tokens, inputs = model.config.vocab_size, (batch.samples, batch.input_tokens)
    rows = batch.samples * batch.rows_per_sample
    labels = torch.randint(5, tokens, (rows, batch.target_tokens))
    rows_of = np.repeat(np.arange(batch.samples), batch.rows_per_sample)
    of_row = torch.from_numpy(rows_of)
    shared = {}
    if batch.shares_memory:
        visible = torch.randint(1, batch.input_tokens, (rows,))
        shared = {"visible": visible, "rows": SampleRows.of(rows_of)}
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
        summed = model(
            input_ids=torch.randint(5, tokens, inputs),
            attention_mask=torch.ones(inputs, dtype=torch.bool),
            position_ids=torch.arange(batch.input_tokens).expand(inputs).contiguous(),
            user_rows=torch.randint(0, 500, inputs),
            item_rows=torch.randint(0, 400, inputs),
            encoder_row=of_row,
            decoder_input_ids=labels,
            labels=labels,
            soft=soft,
            **shared,
        )
    yield summed / labels.numel()


def saved_bytes(model: GenRecForConditionalGeneration, batch: MicroBatch, compute: Compute) -> int:
    """Distinct storages that autograd keeps and that are no parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        micro_batch_loss(model, batch, compute),
    ):
        return sum(storage.nbytes() for storage in kept.values())


LAYERS = ("model.encoder_layers=3", "model.decoder_layers=2", "model.ffn=512")
DROPOUTS = ("dropout", "embedding_dropout", "activation_dropout")
MICRO_BATCHES = [MicroBatch(16, 60, 5), MicroBatch(8, 100, 6), MicroBatch(6, 40, 4, 3)]
MICRO_BATCHES += [MicroBatch(6, 40, 4, 5, shares_memory=True)]


@pytest.mark.parametrize("batch", MICRO_BATCHES, ids=str)
@pytest.mark.parametrize("compute", get_args(Compute))
@pytest.mark.parametrize("dropouts", [(0.1, 0.2, 0.1), (0.0, 0.0, 0.0)], ids=["dropout", "none"])
def test_saved_activations_are_the_measured_ones(
    batch: MicroBatch, compute: Compute, dropouts: tuple[float, float, float]
) -> None:
    sets = [f"model.{name}={p}" for name, p in zip(DROPOUTS, dropouts, strict=True)]
    model, counts = model_on_cpu(compute, *LAYERS, "tokens.vocab_size=4000", *sets)
    heads: tuple[HeadLoss, ...] = ("full", "chunked")
    for head in heads:
        choose_loss(model, head)
        found = saved_bytes(model, batch, compute)
        options: dict[str, Any] = {"mask_bytes": None, "head": head}
        expected = activation_bytes(model.config, counts, batch, compute, **options).saved
        assert expected == pytest.approx(found, rel=0.02), head


# Long inputs, a head that is most of it, and so little input that the embedding's gradients are
# most of it.
PEAKS = [
    (1000, MicroBatch(16, 60, 5)),
    (8000, MicroBatch(8, 100, 6)),
    pytest.param(20000, MicroBatch(32, 20, 6), marks=pytest.mark.ranks),
]


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize(("vocabulary", "batch"), PEAKS, ids=str)
@pytest.mark.parametrize("compute", get_args(Compute))
def test_the_peak_of_a_micro_batch_is_the_measured_one(
    vocabulary: int, batch: MicroBatch, compute: Compute, head: HeadLoss
) -> None:
    model, counts = model_on_cpu(compute, *LAYERS, f"tokens.vocab_size={vocabulary}")
    choose_loss(model, head)
    with micro_batch_loss(model, batch, compute) as loss:
        loss.backward()  # from here on the gradients are there
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    earlier = [tensor.untyped_storage() for tensor in (*tensors, *model.buffers())]
    with LiveBytes(earlier) as live, micro_batch_loss(model, batch, compute) as loss:
        loss.backward()
    options: dict[str, Any] = {"mask_bytes": None, "head": head}
    expected = activation_bytes(model.config, counts, batch, compute, **options).total
    assert expected == pytest.approx(live.most, rel=0.1)


@pytest.mark.parametrize(
    "batch", [MicroBatch(16, 60, 5, soft_items=40), MicroBatch(2, 20, 3)], ids=str
)
@pytest.mark.parametrize("compute", ["fp32", "autocast"])
def test_the_peak_with_texts_and_soft_targets_is_the_measured_one(
    compute: Compute, batch: MicroBatch
) -> None:
    """Of a micro-batch whose soft targets are much of it, and of one that is small beside the
    table of tokens."""
    model, counts = model_on_cpu(compute, *LAYERS, "tokens.vocab_size=8000")
    choose_loss(model, "full")
    text = ItemText(3000, 32, model.config.vocab_size, model.config.d_model)
    torch.nn.init.normal_(text.projection_FD, std=0.1)
    text.rows_N.copy_(torch.randperm(8000)[:3000])
    model.item_text = text
    counts = replace(counts, text=TextSizes(3000, 32))

    def soft() -> SoftTargets | None:
        shape = batch.samples * batch.target_tokens, batch.soft_items
        if not batch.soft_items:
            return None
        return SoftTargets(torch.randint(5, 8000, shape), torch.full(shape, 0.01))

    with micro_batch_loss(model, batch, compute, soft()) as loss:
        loss.backward()
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    earlier = [tensor.untyped_storage() for tensor in (*tensors, *model.buffers())]
    with LiveBytes(earlier) as live, micro_batch_loss(model, batch, compute, soft()) as loss:
        loss.backward()
    options: dict[str, Any] = {"mask_bytes": None, "head": "full"}
    expected = activation_bytes(model.config, counts, batch, compute, **options).total
    assert expected == pytest.approx(live.most, rel=0.1)
    without = replace(batch, soft_items=0), replace(counts, text=None)
    plain = activation_bytes(model.config, without[1], without[0], compute, **options).total
    assert plain < 0.95 * live.most


def test_texts_copies_and_soft_targets_are_those_of_a_real_run(tmp_path: Path) -> None:
    """The buffers of the texts and the parameters with their projection, the host copies of a
    checkpoint, and the soft targets of all prefixes."""
    data = write_data(tmp_path / "data")
    recipe = load_recipe(
        "auto",
        ["model.item_text=add", "finetune.distill.weight=0.5", f"data={data}", f"run={tmp_path / 'run'}", "precision=fp32", "workers=0", "tracker=none",
         "finetune.batch_size=16", "finetune.epochs=1", "validation.every_epochs=1",
         "model.max_tokens=16", "tokens.vocab_size=400", "model.d_model=32", "finetune.distill.top=7"],
    )  # fmt: skip
    setup, model = build_setup(recipe)
    loop = Loop(setup, model, make_accelerator(recipe))
    with contextlib.closing(loop.batches()) as batches:  # type: ignore[type-var]
        place, share = next(batches)
    loop.take_step(place, share, loop.step_totals(share), setup.stages[-1].stage, 1.0)
    loop.checkpoints.save()
    loop.checkpoints.writer.finish()
    copies = loop.checkpoints.writer._copies._buffers.values()
    assert isinstance(model, GenRecForConditionalGeneration)
    assert model.item_text is not None
    assert setup.teacher is not None
    state = memory_of(recipe, setup.dataset, setup.words, model, 1).state("ddp")
    assert state.frozen == sum(values.nbytes for values in model.item_text.buffers())
    assert state.weights == sum(values.nbytes for values in model.parameters())
    assert state.checkpoint_copies == sum(values.nbytes for values in copies) - 4  # the step
    kept = setup.teacher.first_U, setup.teacher.items_SK, setup.teacher.shares_SK
    assert state.soft_targets == sum(values.nbytes for values in kept)
    assert state.host_total == state.checkpoint_copies + state.soft_targets
    # The plan knows nothing of the texts but the source.
    planned, vectors_NF = forecast(recipe).fits[0].state, model.item_text.vectors_NF
    more = vector_width("factors", len(vectors_NF)) - vectors_NF.shape[1]
    assert planned.frozen == state.frozen + 4 * more * len(vectors_NF)
    assert planned.soft_targets == state.soft_targets
    named = [f"item_{number} word{number % 200} word{number % 7}" for number in range(400)]
    assert text_vectors(named, FACTORS, 0).shape[1] == vector_width("factors", 400)


ALL = 1 << 60


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny", "best"])
def test_a_micro_batch_of_auto_stays_within_the_card(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors, which have no content, so that they may be of gigabytes: what forward and
    backward make beside the state, of the shortest and of the longest samples, by a GPU's
    attention."""
    for place, attention in FUSED:
        monkeypatch.setattr(place, attention)
    sets = ["model.dropout=0", "model.embedding_dropout=0", "finetune.batch_size=500000"]
    recipe = load_recipe(name, [*sets, "data=x", "run=x", f"precision={precision}"])
    plan = forecast(recipe, users=5000, items=2000, memory_gib=8)
    (samples,), tokens = plan.samples, plan.recipe.micro_batch_tokens
    config, shares = build_config(recipe, 5000, 2000), []
    limit = usable(8 * GIB)
    for length in (int(samples.quantiles[0]), int(samples.quantiles[-1])):
        batch = samples.micro_batch(tokens // length, length)
        compute: Compute = "autocast" if precision == "bf16" else "fp32"
        with FakeTensorMode(allow_non_fake_inputs=True), Watch("cpu", kept=ALL):
            model = GenRecForConditionalGeneration(config).train()
            model.set_attn_implementation("sdpa")
            with micro_batch_loss(model, MicroBatch(2, 8, 2), compute) as loss:
                loss.backward()
            tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
            earlier = [tensor.untyped_storage() for tensor in (*tensors, *model.buffers())]
            with LiveBytes(earlier) as live, micro_batch_loss(model, batch, compute) as loss:
                loss.backward()
        shares.append((plan.fits[0].state.total + live.most) / limit)
    assert 0.6 < max(shares) <= 1, shares


def test_build_config_reads_the_shape_of_a_backbone_directory(tmp_path: Path) -> None:
    recipe = load_recipe("paper-base", [f"model.backbone={tmp_path}"])
    with pytest.raises(ValueError, match=r"its shape is not known here.*facebook/bart-base"):
        build_config(recipe, 10, 10)
    known = build_config(load_recipe("paper-base"), 10, 10)
    (tmp_path / "config.json").write_text(json.dumps(known.to_dict()))
    assert count_parameters(recipe, build_config(recipe, 10, 10)) == count_parameters(recipe, known)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json: d_model is missing"):
        build_config(recipe, 10, 10)


def test_state_bytes_of_outside_tables_are_a_ranks_rows() -> None:
    """Rows of this rank and the squares beside them, and a step's rows with their gradients;
    nothing of them in ZeRO."""
    recipe = load_recipe(
        "tiny", ["data=x", "run=x", "optimizer.id_tables=row-adagrad", "model.id_dim=32"]
    )
    config = build_config(recipe, 0, 7900)
    counts = count_parameters(recipe, config)
    table = RowTable(7900, 32, init_std=0.02, key=1)
    assert counts.parameters == 7900 * 32 + sum(
        p.numel() for p in GenRecForConditionalGeneration(config).parameters()
    )
    state = state_bytes(counts, "zero2", 1, True, step_id_rows=100)
    held = sum(value.nbytes for value in vars(table).values() if isinstance(value, torch.Tensor))
    assert state.id_rows - 2 * 4 * 100 * 32 == pytest.approx(held, rel=0.01)


def test_state_bytes_of_ddp_by_hand() -> None:
    """Weights, gradients, two moments, and on several ranks the buckets: a copy of the gradients.
    Real ranks say the same (`test_state_bytes_are_the_measured_ones`)."""
    recipe = load_recipe("tiny", ["data=x", "run=x"])
    counts = count_parameters(recipe, build_config(recipe, 0, 100))
    copy = 4 * counts.dense
    alone, two = (state_bytes(counts, "ddp", ranks, bf16=False) for ranks in (1, 2))
    assert (alone.total, two.total) == (4 * copy, 5 * copy)
    assert (alone.buffers, two.buffers) == (0, copy)
    assert state_bytes(counts, "ddp", 2, bf16=False, average=True).total == 6 * copy


def test_peak_is_the_largest_of_micro_batch_step_and_validation() -> None:
    state = State(
        weights=1, masters=2, moments=4, gradients=8, average=16, id_rows=32, buffers=64,
        step_extra=128, validation_extra=256, host=512,
    )  # fmt: skip
    held = 1 + 2 + 4 + 16 + 32
    assert state.peak(1000) == held + 8 + 64 + 1000
    assert state.peak(0) == held + 256
    assert replace(state, validation_extra=0).peak(0) == held + 8 + 128


def test_step_flops_are_about_those_that_torch_counts() -> None:
    """About 18 GFLOP per sample of 50 source and 6 target tokens at BART-base; matrix products
    counted by torch itself."""
    config = build_config(load_recipe("paper-base"), 22_363, 12_101)
    assert step_flops(config, MicroBatch(1, 50, 6)) == pytest.approx(18e9, rel=0.1)
    model, _ = model_on_cpu("fp32", *LAYERS, "tokens.vocab_size=4000")
    with (
        FlopCounterMode(display=False) as counted,
        micro_batch_loss(model, MicroBatch(4, 60, 5), "fp32") as loss,
    ):
        loss.backward()
    assert step_flops(model.config, MicroBatch(4, 60, 5)) == pytest.approx(
        counted.get_total_flops(), rel=0.1
    )
