"""ZeRO 0 to 3 on real DeepSpeed engines and gloo ranks: the same steps as one process, and
checkpoints that fit any of them."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from run_events import events
from safetensors.torch import load_file
from shard_data import sharded_process
from zero_launch import launch
from zero_rank import LISTS_WINDOW

from genrec_dist.config.load import load_recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.load import make_searcher
from genrec_dist.inference.rank_users import Decoding, rank_windows
from genrec_dist.inference.validation import history_loss, target_histogram
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.setup import build_setup

pytestmark = [pytest.mark.dist, pytest.mark.ranks]

STAGES = (0, 1, 2, 3)
SEEN_FP32, SEEN_BF16 = 2e-4, 1.5
"""Largest relative difference in float32; in bf16, largest ratio to what stage 0 itself shows."""

RECIPE = """
data: {data}
run: {folder}/unset
micro_batch_tokens: 192
workers: 0
log_every: 1
checkpoint_every: 3
keep_checkpoints: 99
model: {{d_model: 32, encoder_layers: 2, decoder_layers: 2, heads: 2, ffn: 64,
  max_tokens: 64, dropout: 0.0, init_std: 0.1}}
tokens: {{vocab_size: 300}}
finetune: {{epochs: 2, batch_size: 31, targets: every-prefix}}
optimizer: {{max_grad_norm: 1.0, eps: 1.0e-4}}
validation: {{users: 30}}
"""
# `eps`: AdamW would blow rounding up where gradients are almost zero.


@dataclass(frozen=True)
class Results:
    folder: Path

    def facts(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def change(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def steps(self, run: str) -> list[dict[str, Any]]:
        return events(self.folder / run, "step")

    def weights(self, run: str, kind: str = "weight") -> dict[str, torch.Tensor]:
        return Checkpoint(list_checkpoints(self.folder / run)[-1], {}, Ranks()).weights(kind)


SHARED = (
    "finetune.targets=all-prefixes",
    "finetune.batch_size=11",
    "model.encoder_attention=causal",
    "model.encoder_unit=item",
    "model.decoder_start=state",
    "model.item_loss=0.5",
)
ROWS = ("optimizer.id_tables=row-adagrad", "model.id_dim=8", "finetune.epochs=1")


def some_steps(folder: Path, world: int) -> list[dict[str, Any]]:
    """SGD in both precisions at all stages, AdamW in float32, and a rank whose gradient is left
    out."""
    common = {"recipe": str(folder / "recipe.yaml"), "job": "steps", "steps": 10}
    unclipped = "optimizer.max_grad_norm=0.0"
    both = ("fp32", "bf16")

    def sgd(name: str, stage: int | None, *sets: str, **more: Any) -> dict[str, Any]:
        how = {"optimizer": "sgd", "rate": 0.05, "set": list(sets)}
        return {**common, **how, "name": name, "stage": stage, **more}

    def adamw(name: str, stage: int | None, *sets: str) -> dict[str, Any]:
        return sgd(name, stage, *sets, optimizer="adamw", rate=3e-3)

    jobs = [
        sgd(
            f"{precision}-{stage}-{world}",
            stage,
            f"precision={precision}",
            unclipped,
            lists=stage == 3 and world == 2,
        )
        for precision in both
        for stage in (None, *STAGES)
    ]
    # Two ranks at stage 3 against a plain process, by either loss of the head.
    fp32, stage = ("precision=fp32", unclipped), 3 if world == 2 else None
    for how in ("full", "chunked"):
        jobs.append(sgd(f"trimmed-{how}-{world}", stage, f"head={how}", "tokens.trim=true", *fp32))
    jobs.append(sgd(f"shared-{world}", stage, *fp32, *SHARED))
    jobs.append(adamw(f"adamw-None-{world}", None))
    if world == 2:
        jobs += [sgd(f"full-{stage}-2", stage, "head=full", *fp32) for stage in (None, 2, 3)]
        jobs += [adamw(f"adamw-{stage}-2", stage) for stage in STAGES]
        jobs += [adamw(f"adamw-bf16-{stage}", stage, "precision=bf16") for stage in (0, 2)]
        for precision in both:
            name, sets = f"lost-{precision}", (f"precision={precision}", unclipped)
            jobs.append(sgd(name, 2, *sets, leave_out=1))
            for stage in STAGES:
                name = f"spoiled-{precision}-{stage}"
                jobs.append(sgd(name, stage, sets[0], steps=3, spoil=True))
    return jobs


def a_run(
    folder: Path, name: str, stage: int | None, *more: str, resume: str | None = None
) -> dict[str, Any]:
    sets = [f"run={folder / name}", "optimizer.ema_decay=0.9", *more]
    job = {"name": name, "stage": stage, "recipe": str(folder / "recipe.yaml"), "job": "train"}
    return {**job, "set": sets, "resume": resume}


def broken_off(folder: Path, source: str, name: str, step: int) -> None:
    """A copy of a run as a kill after this step's checkpoint would leave it."""
    shutil.copytree(folder / source, folder / name)
    for path in (folder / name / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (folder / name / "events.jsonl").unlink()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("zero")
    data = sharded_process(folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(data=data, folder=folder))
    first = [a_run(folder, f"whole-{stage}", stage) for stage in (2, 3)]
    first.append(a_run(folder, "whole-bf16", 2, "precision=bf16"))
    first += [a_run(folder, f"rows-{stage}", stage, *ROWS) for stage in (None, 2, 3)]
    launch(some_steps(folder, 2) + first, folder, 2)
    for name in ("three-to-three", "three-to-one", "three-to-ddp", "three-to-plain"):
        broken_off(folder, "whole-3", name, step=9)
    for name, source in (("two-to-two", "whole-2"), ("bf16-to-bf16", "whole-bf16")):
        broken_off(folder, source, name, step=9)
    for name in ("three-to-alone", "torn"):
        broken_off(folder, "whole-3", name, step=9)
    torn = next((folder / "torn" / "checkpoints" / "step-00000009").glob("rank-00001-*"))
    torn.write_bytes(torn.read_bytes()[:-4] + b"\0\0\1\0")
    to_stage = {"three-to-three": 3, "two-to-two": 2, "three-to-one": 1, "three-to-ddp": None}
    resumed = [a_run(folder, *pair, resume="latest") for pair in (*to_stage.items(), ("torn", 3))]
    resumed.append(a_run(folder, "bf16-to-bf16", 2, "precision=bf16", resume="latest"))
    launch(resumed, folder, 2)
    to_stage = {"three-to-plain": None, "three-to-alone": 3}
    alone = [a_run(folder, *pair, resume="latest") for pair in to_stage.items()]
    alone.append(a_run(folder, "rows-alone", None, *ROWS))
    launch(some_steps(folder, 1) + alone, folder, 1)
    return Results(folder)


def is_noise(name: str) -> bool:
    """Softmax does not feel what a key's bias adds to all scores of a query: its gradient is
    rounding alone."""
    return name.endswith("k_proj.bias")


def difference(results: Results, one: str, two: str) -> dict[str, float]:
    """||dw_two - dw_one|| / ||dw_one|| a tensor."""
    first, second = results.change(one), results.change(two)
    assert set(first) == set(second)
    return {
        name: float((second[name] - first[name]).norm() / first[name].norm())
        for name in first
        if not is_noise(name)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_is_the_requested_one(results: Results, stage: int) -> None:
    for precision in ("fp32", "bf16"):
        facts = results.facts(f"{precision}-{stage}-2")
        found = (facts["distributed_type"], facts["stage"], facts["processes"])
        assert found == ("DEEPSPEED", stage, 2)
        # A rank went through the layers with a dummy micro-batch, or the case would not be tested.
        assert facts["idle"] > 0
    assert results.facts("fp32-None-2")["distributed_type"] == "MULTI_CPU"
    assert results.facts("fp32-None-1")["processes"] == 1


# At each stage two ranks against one, and against a process without DeepSpeed; with the full head
# where all others have the chunked one; with a trimmed head, which multiplies with a part of the
# tied weight; with samples that share an encoding and both heads, where the embedding and the item
# head read the rows of the id table.
PAIRS = [
    *((f"fp32-{one}-1", f"fp32-{stage}-2") for stage in STAGES for one in (stage, None)),
    *(("fp32-None-1", f"full-{stage}-2") for stage in (None, 2, 3)),
    *((f"trimmed-{how}-1", f"trimmed-{how}-2") for how in ("full", "chunked")),
    ("shared-1", "shared-2"),
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_fp32_steps_are_the_same(results: Results, one: str, two: str) -> None:
    worst = difference(results, one, two)
    assert max(worst.values()) <= SEEN_FP32, max(worst.items(), key=lambda pair: pair[1])
    assert results.facts(one)["digests"] == results.facts(two)["digests"]
    if two in ("shared-2", "trimmed-full-2"):
        assert results.facts(two)["stage"] == 3


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_steps_differ_no_more_than_at_stage_0(results: Results, stage: int) -> None:
    reference = difference(results, "bf16-0-1", "bf16-0-2")
    found = difference(results, f"bf16-{stage}-1", f"bf16-{stage}-2")
    assert max(found.values()) <= SEEN_BF16 * max(reference.values())
    # Read by encoder, decoder and head: what DeepSpeed was reported to get wrong.
    shared = "model.shared.weight"
    assert found[shared] <= SEEN_BF16 * reference[shared]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_steps_are_near_a_plain_process(results: Results, stage: int) -> None:
    """Masters that start from rounded weights would be off by more than the steps themselves."""
    assert max(difference(results, "bf16-None-1", f"bf16-{stage}-2").values()) < 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_tensors_of_pure_noise_stay_where_they_are(results: Results, stage: int) -> None:
    moved = results.change(f"fp32-{stage}-2")
    largest = max(float(change.abs().max()) for change in moved.values())
    for name in filter(is_noise, moved):
        assert float(moved[name].abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lost_gradient_would_be_seen(results: Results, precision: str) -> None:
    """The control: one rank's gradient left out must break both bounds by far."""
    worst = difference(results, f"{precision}-2-1", f"lost-{precision}")
    reference = difference(results, f"{precision}-0-1", f"{precision}-0-2")
    assert min(worst.values()) > max(SEEN_FP32, SEEN_BF16 * max(reference.values()))


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_adamw_follows_the_same_curve(results: Results, stage: int | None) -> None:
    alone, together = results.facts("adamw-None-1"), results.facts(f"adamw-{stage}-2")
    assert np.allclose(alone["losses"], together["losses"], rtol=2e-4)
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]


COLUMNS = (
    "engine",
    "fp32: 2 ranks against 1",
    "fp32: against a plain process",
    "bf16: 2 ranks against 1",
    "bf16: shared embedding",
    "bf16: against a plain process",
)
HEAD = ("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS))


def parity_table(results: Results) -> list[str]:
    """Lines of the table in docs/scale.md."""
    lines = []
    for stage in (None, *STAGES):
        figures = [
            max(difference(results, f"{precision}-{one}-1", f"{precision}-{stage}-2").values())
            for precision in ("fp32", "bf16")
            for one in (stage, None)
        ]
        shared = difference(results, f"bf16-{stage}-1", f"bf16-{stage}-2")["model.shared.weight"]
        figures.insert(3, shared)
        name = "DDP" if stage is None else f"ZeRO {stage}"
        lines.append(f"| {name} | " + " | ".join(f"{figure:.1e}" for figure in figures) + " |")
    return [*HEAD, *lines]


def test_the_docs_show_the_table(results: Results) -> None:
    """GENREC_WRITE_DOCS=1 writes it; otherwise what stands there has to keep the bounds and be of
    today's kind."""
    page = ROOT / "docs" / "scale.md"
    before, rest = page.read_text().split("<!-- parity:begin -->\n")
    shown, after = rest.split("<!-- parity:end -->")
    table = parity_table(results)
    if os.environ.get("GENREC_WRITE_DOCS"):
        shown = "\n".join(table) + "\n"
        page.write_text(f"{before}<!-- parity:begin -->\n{shown}<!-- parity:end -->{after}")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    today = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == today[0]
    assert [row[0] for row in cells[2:]] == [row[0] for row in today[2:]]
    for row, now in zip(cells[2:], today[2:], strict=True):
        assert max(map(float, row[1:3])) <= SEEN_FP32
        # Another machine sums in another order, and not by another order of magnitude.
        for one, two in zip(row[1:], now[1:], strict=True):
            assert abs(math.log10(float(one) / float(two))) < 1.5


@pytest.mark.parametrize(
    "name", [*(f"adamw-{stage}-2" for stage in (None, *STAGES)), "adamw-bf16-0", "adamw-bf16-2"]
)
def test_adamw_counts_the_steps_there_were(results: Results, name: str) -> None:
    """DeepSpeed makes room for moments by a step without gradients; counted, it would bend the
    first real ones."""
    assert results.facts(name)["optimizer_step"] == 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_ends_the_run(
    results: Results, stage: int, precision: str
) -> None:
    """DeepSpeed would skip the step, and with it the samples, without a word; the loss itself is
    finite here."""
    errors = results.facts(f"spoiled-{precision}-{stage}")["errors"]
    assert len(errors) == 2
    for error in errors:
        assert "the gradient norm is" in error
        assert "at step 2: nothing was saved since" in error


def test_every_rank_and_stage_takes_the_same_samples(results: Results) -> None:
    digests = [
        results.facts(f"fp32-{stage}-{world}")["digests"]
        for stage in (None, *STAGES)
        for world in (1, 2)
    ]
    assert all(found == digests[0] for found in digests)
    assert len(set(digests[0])) == 10


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [("three-to-three", "whole-3"), ("two-to-two", "whole-2"), ("bf16-to-bf16", "whole-bf16")],
)
def test_a_resume_at_the_same_size_is_the_unbroken_run_to_the_bit(
    results: Results, resumed: str, whole: str
) -> None:
    for kind in ("weight", "exp_avg", "exp_avg_sq", "average"):
        one, two = results.weights(whole, kind), results.weights(resumed, kind)
        for name in one:
            assert torch.equal(one[name], two[name]), (kind, name)


@pytest.mark.parametrize(
    "resumed", ["three-to-one", "three-to-ddp", "three-to-plain", "three-to-alone"]
)
def test_a_resume_at_another_size_or_stage_goes_on(results: Results, resumed: str) -> None:
    """The rest of the run takes the same samples and comes to the same weights, up to the order of
    sums."""
    whole, rest = results.steps("whole-3")[9:], results.steps(resumed)
    for key in ("step", "samples_digest"):
        assert [event[key] for event in rest] == [event[key] for event in whole]
    losses = [[event["loss"] for event in events] for events in (rest, whole)]
    assert np.allclose(*losses, rtol=1e-3)
    for kind in ("weight", "average"):
        one, two = results.weights("whole-3", kind), results.weights(resumed, kind)
        assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)


def test_no_rank_loads_a_torn_checkpoint(results: Results) -> None:
    errors = results.facts("torn")["errors"]
    assert len(errors) == 2
    damaged = "rank-00001-of-00002.safetensors: damaged or missing; resume from an older"
    assert all(damaged in error for error in errors)


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_id_tables_stay_outside_and_learn_the_same(results: Results, stage: int | None) -> None:
    """Tables outside autograd and ZeRO: two ranks come to the rows of one process, at any stage."""
    runs = ("rows-alone", f"rows-{stage}")
    load = GenRecForConditionalGeneration.from_pretrained
    alone, together = (load(results.folder / run / "best") for run in runs)
    for name in ("user_embedding", "item_embedding"):
        one, two = (getattr(model, name).weight for model in (alone, together))
        assert one.shape[1] == 8
        assert torch.allclose(one, two, atol=2e-4)
    losses = [[event["loss"] for event in results.steps(run)] for run in runs]
    assert np.allclose(*losses, rtol=1e-3)
    files = {path.name for path in list_checkpoints(results.folder / f"rows-{stage}")[-1].iterdir()}
    for name in ("user-00000", "user-00001", "item-00000", "item-00001"):
        assert f"ids-{name}-of-00002.safetensors" in files


def test_lists_amid_a_zero_3_run_are_those_of_one_process(results: Results) -> None:
    """Decoding is each rank's own affair: unequal numbers of batches hang nobody, and one process
    finds the same lists."""
    facts = results.facts("fp32-3-2")
    setup, _ = build_setup(load_recipe(results.folder / "recipe.yaml"))
    model = GenRecForConditionalGeneration.from_pretrained(results.folder / "fp32-3-2").eval()
    searcher = make_searcher(model, setup.words, torch.device("cpu"))
    view, users = setup.dataset.sequences.history_and_target("validation"), np.arange(90)
    layout, decoding = setup.layout, Decoding(batch_size=16)
    found = rank_windows(searcher, layout, view, users, decoding, Ranks(), window=LISTS_WINDOW)
    windows = list(found)
    assert [window.user_rows.tolist() for window in windows] == facts["users"]
    assert [window.items.tolist() for window in windows] == facts["items"]
    for window, theirs in zip(windows, facts["scores"], strict=True):
        assert np.allclose(window.scores, theirs, rtol=1e-5)
    counts = target_histogram(searcher, layout, view, users, decoding, Ranks())
    assert counts.tolist() == facts["counts"]
    loss = history_loss(model, setup.layout, view, users, Ranks(), batch_size=16)
    assert loss == pytest.approx(facts["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("run", ["whole-2", "whole-3", "whole-bf16"])
def test_best_is_a_plain_model(results: Results, run: str) -> None:
    best = GenRecForConditionalGeneration.from_pretrained(results.folder / run / "best")
    assert {p.dtype for p in best.parameters()} == {torch.float32}
    files = [path.suffix for path in (results.folder / run).glob("**/*")]
    assert not {".pt", ".bin"} & set(files)
    # The averaged masters themselves, not the rounded weights that the layers see.
    status = json.loads((results.folder / run / "status.json").read_text())
    at_best = results.folder / run / "checkpoints" / f"step-{status['best_step'] + 1:08d}"
    averages = Checkpoint(at_best, {}, Ranks()).weights("average")
    for name, parameter in best.named_parameters():
        assert torch.equal(parameter.detach().reshape(-1), averages[name]), name


def test_padding_samples_are_counted_and_not_learned(results: Results) -> None:
    """31 samples on two ranks: one is repeated to even them out, and the loss is that of one
    process."""
    steps = results.steps("whole-3")
    assert all(event["padding_samples"] == event["samples"] % 2 for event in steps)
    assert any(event["padding_samples"] for event in steps)
    assert math.isfinite(sum(event["loss"] for event in steps))
