"""Steps of micro-batches of one size: what they give, that every one launches the same operators in
the same shapes and reads nothing, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from genrec_kernels import Rows, make_gradient_order
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.training.engine import Replicated
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import stage_of
from genrec_dist.training.step.fixed_size import Sizes, fitted, sizes_of
from genrec_dist.training.step.graph import StepGraph

SMALL = (
    "precision=fp32",
    "workers=0",
    "head=full",
    "packing=packed",
    "micro_batch_tokens=512",
    "tokens.vocab_size=285",
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=32",
    "model.dropout=0",
    "model.embedding_dropout=0",
    "finetune.batch_size=40",
    "optimizer.eps=1e-4",
)
READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "_unique2", "bincount"}
CASES: dict[str, tuple[str, ...]] = {
    "tiny": ("tiny", "finetune.label_smoothing=0.1", "model.user_ids=true"),
    "best": ("best", "finetune.batch_size=12"),
    "item head": ("best", "finetune.batch_size=12", "model.item_loss=0.5", "model.id_dim=8"),
    "masks": ("small", "pretrain.epochs=3", "pretrain.batch_size=40", "model.max_tokens=64"),
}


def recipe_of(case: str, data: Path, *changes: str) -> Recipe:
    name, *own = CASES[case]
    return load_recipe(name, [f"data={data}", "run=r", *SMALL, *own, *changes])


class World:
    """A run's loop, and its steps with micro-batches of one size or of any."""

    def __init__(self, recipe: Recipe, one_size: bool):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.setup, model = build_setup(recipe)
        self.loop = Loop(self.setup, model, make_accelerator(recipe))
        made = self.setup
        self.data = StepBatches(
            made.stages, made.reader, made.layout, recipe, 0, 1, packed=True, one_size=one_size
        )
        if one_size:
            assert isinstance(self.loop.engine, Replicated)
            self.loop.graph = StepGraph(self.loop.engine, capture=False)

    def take(self, step: int) -> float:
        share, stage = self.data[step], stage_of(self.setup.stages, step).stage
        loss, _ = self.loop.take_step(step, share, self.loop.step_totals(share), stage, 0.5)
        return float(loss)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.loop.model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_one_size_gives_the_losses_and_weights_of_any_size(case: str, tiny_data: Path) -> None:
    recipe = recipe_of(case, tiny_data)
    plain, fixed = World(recipe, one_size=False), World(recipe, one_size=True)
    losses = [[world.take(step) for step in range(5)] for world in (plain, fixed)]
    assert any(len(fixed.data[step].micro_batches) > 1 for step in range(5))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    ours, theirs = fixed.weights(), plain.weights()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-4, atol=1e-6), name


class Launches(TorchDispatchMode):
    """Each operator with the shapes, types and places of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}, out))
        values = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype)
            if isinstance(leaf, torch.Tensor)
            else str(leaf)
            for leaf in leaves
        ]
        if func.namespace != "profiler":
            self.seen.append((func.overloadpacket.__name__, *values))
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_every_step_launches_the_same_operators_and_reads_no_value(
    case: str, precision: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph that was captured once would replay."""
    # Ids on a CPU are read to be checked.
    monkeypatch.setattr("genrec_dist.model.seq2seq.base.check_ranges", lambda encoder, config: None)
    dropouts = ("model.dropout=0.1", "model.embedding_dropout=0.1", "model.attention_dropout=0.1")
    recipe = recipe_of(case, tiny_data, f"precision={precision}", *dropouts)
    world = World(recipe, one_size=True)
    graph = world.loop.graph
    assert graph is not None
    learned, finished = [], []
    learn, finish = graph._learn, graph._finish

    def watched_learn(*arguments: Any) -> None:
        with Launches() as watch:
            learn(*arguments)
        learned.append(watch.seen)

    def watched_finish() -> None:
        with Launches() as watch:
            finish()
        finished.append(watch.seen)

    for step in range(4):
        world.take(step)
        graph._learn, graph._finish = watched_learn, watched_finish  # type: ignore[method-assign]
    assert len(learned) > len(finished) == 3
    for seen in (learned, finished):
        names = {name for name, *_ in seen[0]}
        assert not names & READS
        for other in seen[1:]:
            different = [
                pair for pair in itertools.zip_longest(seen[0], other) if pair[0] != pair[1]
            ]
            assert not different, different[0]
    assert "_fused_adamw_" in {name for name, *_ in finished[0]}


def test_a_step_that_does_not_fit_is_cut_into_more(tiny_data: Path) -> None:
    world = World(recipe_of("tiny", tiny_data), one_size=False)
    cuts: list[int] = []

    def make(budget: int) -> RankStep:
        cuts.append(budget)
        world.data.recipe = replace(world.setup.recipe, micro_batch_tokens=max(budget, 1))
        return world.data[0]

    sizes = sizes_of([make(512)], 50)
    small = replace(sizes, sequences=6, rows=6)
    step = fitted(make, small, 512, world.setup.layout.pad_token)
    assert cuts[-1] < cuts[0]
    assert step.samples_digest == make(512).samples_digest
    assert all(batch.labels.numel() == small.targets for batch in step.micro_batches)
    assert sum(batch.num_samples for batch in step.micro_batches) == step.num_samples
    with pytest.raises(ValueError, match="more decoder tokens than a fixed micro-batch"):
        fitted(make, Sizes(512, 1, 9, 9), 512, world.setup.layout.pad_token)


def test_the_size_is_the_same_wherever_a_run_begins(tiny_data: Path) -> None:
    recipe = recipe_of("tiny", tiny_data)
    first, second = (World(recipe, one_size=True) for _ in range(2))
    second.data[7]
    assert first.data.sizes == second.data.sizes
    assert (
        first.data[7].micro_batches[0].labels.shape == second.data[2].micro_batches[0].labels.shape
    )


def test_a_fixed_gradient_order_has_the_sizes_of_its_places_alone() -> None:
    few = torch.zeros(256, dtype=torch.long).numpy()
    many = torch.arange(256).numpy()
    orders = [make_gradient_order([Rows("token", ids, 256)], fixed=True) for ids in (few, many)]
    assert orders[0].segments == orders[1].segments
    assert orders[0].packed.shape == orders[1].packed.shape
    free = [make_gradient_order([Rows("token", ids, 256)]) for ids in (few, many)]
    assert free[0].segments != free[1].segments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.id_tables=row-adagrad", "row-adagrad: .* set dense, or step_graph off"),
        ("model.architecture=t5 model.positions=from-start", "model.architecture t5: .*: set bart"),
        ("precision=fp16", "precision fp16: its loss scale is read on the host: set bf16"),
        ("packing=padded", "packing padded: .*: set packed"),
        ("head=chunked", "head chunked: .*: set full"),
        ("compile=layers", "compile layers: set none"),
        ("activation_checkpointing=true", "activation_checkpointing: .* set false"),
        ("model.encoder_unit=item", "encoder_unit item: .*: set subword"),
        (
            "precision=fp32 micro_batch_tokens=6144",
            "micro_batch_tokens 6,144: in fp32, .* set 4,096 or less",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"step_graph on: .*{message}"):
        load_recipe("tiny", ["step_graph=on", "precision=bf16", *change.split()])


def test_a_run_without_a_gpu_refuses_and_auto_is_off(tiny_data: Path) -> None:
    recipe = recipe_of("tiny", tiny_data)
    assert recipe.step_graph == "auto"
    assert World(recipe, one_size=False).loop.graph is None
    setup, model = build_setup(recipe)
    recipe = replace(recipe, step_graph="on")
    with pytest.raises(ValueError, match="step_graph on: this run is on cpu and graphs are CUDA's"):
        Loop(replace(setup, recipe=recipe), model, make_accelerator(recipe))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_captured_step_gives_the_weights_of_the_plain_one(tiny_data: Path) -> None:
    from genrec_dist.bench.gpu.graph import compare

    found = compare(recipe_of("tiny", tiny_data, "precision=bf16"), steps=20)
    assert found["captured"]
    assert found["weights apart"] < 1e-3
