"""Training: resume to the bit, signals, NaN, two ranks, and what a run leaves."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Started
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process
from run_events import events
from shard_data import sharded_process
from two_ranks import start_each

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import NotFinite
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.loader import StepBatches, ahead
from genrec_dist.training.loop import Loop
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup, describe
from genrec_dist.training.stages import plan_stages

PATIENCE = 600
"""Seconds that a process may take, also on a machine that is busy with other work."""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_process(tmp_path_factory.mktemp("train"))


RECIPE = """
micro_batch_tokens: 256
workers: 0
log_every: 1
checkpoint_every: 3
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 16, max_tokens: 64}
tokens: {vocab_size: 300}
pretrain: {epochs: 1, batch_size: 16, mask: {strategy: multi, k: 2}}
finetune: {epochs: 2, batch_size: 32, targets: every-prefix}
validation: {users: 30}
"""


def recipe_in(folder: Path, data: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"data: {data}\nrun: {folder / 'run'}\n{RECIPE}")
    return load_recipe(path)


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    return recipe_in(tmp_path, data)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def weights(run: Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    return Checkpoint(list_checkpoints(run)[-1], {}, Ranks()).weights(kind)


def files_of(folder: Path) -> dict[str, object]:
    """The bytes of each file; of safetensors what the header says and the bytes behind it, since
    two writings of the same header may name its notes in another order."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            found[path.name] = (json.loads(content[8:end]), content[end:])
        else:
            found[path.name] = content
    return found


def start(recipe: Recipe, folder: Path, *more: str) -> Started:
    path = folder / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    command = ["-m", "genrec_dist.train", path, *more]
    return Started(command, folder / "out.txt", folder / "err.txt", ENVIRONMENT)


def wait_for_step(process: Started, run: Path, step: int) -> None:
    log = run / "events.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a finished run. Read only."""
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), data)
    train(recipe)
    return recipe


def test_train_leaves_a_complete_run_directory(finished: Recipe) -> None:
    run = Path(finished.run)
    assert load_recipe(run / "recipe.yaml") == finished
    steps = events(run, "step")
    total = sum(stage.num_steps for stage in build_setup(finished)[0].stages)
    assert [event["step"] for event in steps] == list(range(total))
    assert {event["stage"] for event in steps} == {"pretrain", "finetune"}
    (start,) = events(run, "start")
    assert "cross-attention" in start["flops_formula"]
    for event in steps:
        assert math.isfinite(event["loss"])
        assert event["tokens_per_second"] > 0
        assert 0 <= event["padding_share"] < 1
        assert 0 <= event["data_wait_share"] <= 1
        operations = event["tflops_per_second"] * 1e12
        assert event["mfu"] == pytest.approx(operations / start["peak"]["flops"])
        assert 0.05 < event["peak_memory_gib"] < 24
    validations = events(run, "validation")
    assert [event["epoch"] for event in validations] == [0, 1]
    assert (status(run)["status"], status(run)["step"]) == ("finished", total)
    assert any((run / "tensorboard").iterdir())
    best = GenRecForConditionalGeneration.from_pretrained(run / "best")
    assert best.config.numbering_hash == load_dataset(finished.data).numbering.numbering_hash()
    assert len(list_checkpoints(run)) == finished.keep_checkpoints
    # `best` is the best validation, not the last; of equal ones the first.
    step = max(validations, key=lambda event: event["NDCG@10"])["step"]
    assert status(run)["best_step"] == step
    assert json.loads((run / "best" / "step.json").read_text())["step"] == step


def test_training_learns(recipe: Recipe) -> None:
    finetune = replace(recipe.finetune, epochs=12, learning_rate=1e-2)
    run = train(replace(recipe, finetune=finetune, checkpoint_every=10_000))
    losses = [event["loss"] for event in events(run, "step") if event["stage"] == "finetune"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


# With the running average there is more to restore, so it is the one of the two that always runs.
@pytest.mark.parametrize("average", [pytest.param(0.0, marks=pytest.mark.ranks), 0.9])
def test_sigkill_at_a_random_step_resumes_to_the_same_bits(
    recipe: Recipe, tmp_path: Path, average: float
) -> None:
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, ema_decay=average), workers=1)
    unbroken = replace(recipe, run=str(tmp_path / "unbroken"))
    done = start(unbroken, tmp_path).wait(PATIENCE)
    assert done.returncode == 0, done.stderr
    last = events(tmp_path / "unbroken", "step")[-1]["step"]

    seed = random.randrange(1 << 30)
    step = random.Random(seed).randrange(3, last)
    process = start(recipe, tmp_path)
    wait_for_step(process, Path(recipe.run), step)
    while not list_checkpoints(Path(recipe.run)):  # the first is written beside the steps
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(PATIENCE).returncode == -signal.SIGKILL
    assert status(Path(recipe.run))["status"] == "running"
    done = start(recipe, tmp_path, "--resume", "latest").wait(PATIENCE)
    assert done.returncode == 0, done.stderr
    assert events(Path(recipe.run), "start")[1]["resumed_from"]

    where = f"after a kill at step {step} (seed {seed})"
    for kind in ("weight", "exp_avg", "exp_avg_sq", *(["average"] if average else [])):
        expected, found = (weights(run, kind) for run in (tmp_path / "unbroken", Path(recipe.run)))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{kind} of {name} differs {where}"
    assert status(Path(recipe.run))["best_step"] == status(tmp_path / "unbroken")["best_step"]
    expected, found = (files_of(run / "best") for run in (tmp_path / "unbroken", Path(recipe.run)))
    assert expected.keys() == found.keys()
    for name, content in expected.items():
        assert content == found[name], f"best/{name} differs {where}"


def test_runs_of_one_process_are_those_of_processes_of_their_own(
    recipe: Recipe, tmp_path: Path
) -> None:
    """As in a notebook or a sweep: neither precision nor the order of operations stays behind."""
    short = replace(
        recipe,
        pretrain=replace(recipe.pretrain, epochs=0),
        finetune=replace(recipe.finetune, epochs=1),
    )
    runs = {}
    for name, precision, fixed in (("a", "fp32", True), ("b", "bf16", False), ("c", "fp32", False)):
        run = str(tmp_path / name)
        runs[name] = train(replace(short, run=run, precision=precision, deterministic=fixed))
        assert torch.is_autocast_enabled("cpu") is False
        assert torch.are_deterministic_algorithms_enabled() is False
    found = {name: [line["loss"] for line in events(run, "step")] for name, run in runs.items()}
    assert found["a"] == found["c"] != found["b"]
    assert {line["recipe"]["precision"] for line in events(runs["b"], "start")} == {"bf16"}


def test_another_seed_gives_other_weights(finished: Recipe, tmp_path: Path) -> None:
    """So that the comparison above can fail."""
    first = weights(Path(finished.run))
    second = weights(train(replace(finished, seed=1, run=str(tmp_path / "other"))))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.ranks)],
)
def test_a_signal_saves_and_says_so(recipe: Recipe, tmp_path: Path, number: int, code: int) -> None:
    recipe = replace(recipe, checkpoint_every=10_000, finetune=replace(recipe.finetune, epochs=200))
    process = start(recipe, tmp_path)
    wait_for_step(process, Path(recipe.run), 4)
    os.kill(process.pid, number)
    done = process.wait(PATIENCE)
    errors = done.stderr
    assert done.returncode == code, errors
    run = Path(recipe.run)
    told = status(run)
    assert told["status"] == "stopped"
    assert signal.Signals(number).name in told["reason"]
    assert list_checkpoints(run)[-1].name == f"step-{told['step']:08d}"
    assert "--resume latest" in errors
    assert "Traceback" not in errors


def test_nan_names_the_step_and_saves_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import genrec_dist.model.seq2seq.base as module

    real, calls = module.head_loss, []

    def poisoned(*arguments: object) -> torch.Tensor:
        calls.append(1)
        loss = real(*arguments)
        return loss * math.nan if len(calls) > 12 else loss

    monkeypatch.setattr(module, "head_loss", poisoned)
    lazy = replace(recipe, log_every=1000, checkpoint_every=10_000)
    with pytest.raises(NotFinite, match=r"nan at step \d+") as caught:
        train(lazy)
    run = Path(lazy.run)
    assert status(run)["status"] == "failed"
    assert "at step" in status(run)["reason"]
    named = int(str(caught.value).split("at step ")[1].split(":")[0])
    assert all(int(path.name.removeprefix("step-")) <= named for path in list_checkpoints(run))
    for path in list_checkpoints(run):
        for tensor in Checkpoint(path, {}, Ranks()).weights().values():
            assert tensor.isfinite().all()


def test_a_gradient_that_is_no_number_saves_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss can have an infinite gradient; the weights it spoils must not reach a
    checkpoint."""
    real = Loop.take_step

    def poisoned(self: Loop, step: int, *rest: object) -> object:
        if step == 7:
            self.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        return real(self, step, *rest)

    monkeypatch.setattr(Loop, "take_step", poisoned)
    with pytest.raises(NotFinite, match=r"gradient norm is (nan|inf) at step 7"):
        train(replace(recipe, checkpoint_every=4))
    assert [path.name for path in list_checkpoints(Path(recipe.run))][-1] <= "step-00000007"


def test_a_run_that_cannot_be_started_or_resumed_is_refused(
    finished: Recipe, tmp_path: Path
) -> None:
    prepare(Path(finished.data).parent / "log.txt", tmp_path / "data", seed=5)
    shards = tmp_path / "data" / "shards"
    write_shards(load_dataset(tmp_path / "data"), shards, users_per_shard=32, users_per_record=16)
    dropout = replace(finished, model=replace(finished.model, dropout=0.3))
    for recipe, resume, message in (
        (finished, None, "--resume latest"),
        (dropout, "latest", "another recipe"),
        (replace(finished, data=str(tmp_path / "data")), "latest", "numbering"),
        (replace(finished, run=str(tmp_path / "none")), "latest", "no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe, resume)


def test_shards_of_other_sequences_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    sequences = make_process(num_items=64, num_groups=8).sample(40, 5, 9, seed=9)
    write_sequences(sequences, tmp_path / "log.txt")
    other = prepare(tmp_path / "log.txt", tmp_path / "data")
    write_shards(other, tmp_path / "shards", users_per_shard=32, users_per_record=16)
    with pytest.raises(ValueError, match="genrec shard"):
        train(replace(recipe, shards=str(tmp_path / "shards")))


def test_patience_ends_the_run_and_of_equal_epochs_the_first_stays_best(recipe: Recipe) -> None:
    # A learning rate of almost nothing: no validation can gain on the first.
    stuck = replace(
        recipe,
        pretrain=replace(recipe.pretrain, epochs=0),
        finetune=replace(recipe.finetune, epochs=9, learning_rate=1e-12),
        validation=replace(recipe.validation, patience=2),
    )
    run = train(stuck)
    validations = events(run, "validation")
    assert len(validations) == 3
    assert status(run)["status"] == "finished"
    # As good is not better: the model that is kept is that of the first epoch.
    assert len({event["NDCG@10"] for event in validations}) == 1
    assert status(run)["best_step"] == validations[0]["step"]
    assert json.loads((run / "best" / "step.json").read_text())["step"] == validations[0]["step"]


def test_dry_run_writes_nothing(recipe: Recipe) -> None:
    facts = describe(recipe)
    assert facts["stages"]["finetune"]["steps an epoch"] > 0
    # A fresh model knows nothing: its first loss is that of a uniform guess over the vocabulary.
    assert facts["first loss"] == pytest.approx(math.log(facts["vocabulary"]), rel=0.05)
    assert not Path(recipe.run).exists()


def test_stages_follow_each_other_and_share_no_epoch(recipe: Recipe) -> None:
    setup, _ = build_setup(recipe)
    first, second = plan_stages(recipe, setup.reader)
    assert (first.first_step, first.end_step) == (0, second.first_step)
    assert second.first_epoch == recipe.pretrain.epochs
    assert second.locate(second.first_step) == (0, 0)
    assert second.ends_epoch(second.end_step - 1)


def test_an_epoch_ends_after_its_fraction_with_a_validation_and_draws_anew(recipe: Recipe) -> None:
    whole = plan_stages(recipe, build_setup(recipe)[0].reader)[1]
    stage = replace(recipe.finetune, epoch_fraction=0.3, epochs=3)
    recipe = replace(recipe, finetune=stage, pretrain=replace(recipe.pretrain, epochs=0))
    (found,) = plan_stages(recipe, build_setup(recipe)[0].reader)
    assert found.epoch_steps == math.ceil(whole.epoch_steps * 0.3) < whole.epoch_steps
    drawn = []
    for epoch in range(stage.epochs):
        steps = [found.plan.step(epoch, step) for step in range(found.epoch_steps)]
        drawn.append({sample for step in steps for sample in step.sample_ids.tolist()})
        assert len(drawn[-1]) == found.epoch_steps * stage.batch_size
    assert all(one != other for one, other in itertools.combinations(drawn, 2))

    run = train(recipe)
    assert len(events(run, "step")) == found.num_steps
    ends = [(epoch + 1) * found.epoch_steps - 1 for epoch in range(stage.epochs)]
    assert [line["step"] for line in events(run, "validation")] == ends


def gradients(loop: Loop, share: RankStep) -> list[torch.Tensor]:
    kept = []
    step = loop.engine.step

    def kept_and_stepped() -> torch.Tensor:
        kept.extend(p.grad.clone() for p in loop.model.parameters())
        return step()

    loop.engine.step = kept_and_stepped  # type: ignore[method-assign]
    loop.take_step(0, share, loop.step_totals(share), loop.recipe.pretrain, 0.0)
    return kept


def test_gradients_do_not_depend_on_the_cut_into_micro_batches(recipe: Recipe) -> None:
    found = []
    for tokens in (64, 100_000):
        cut = replace(recipe, micro_batch_tokens=tokens, model=replace(recipe.model, dropout=0.0))
        setup, model = build_setup(cut)
        data = StepBatches(setup.stages, setup.reader, setup.layout, cut, 0, 1)
        found.append(gradients(Loop(setup, model, make_accelerator(cut)), data[0]))
        assert (len(data[0].micro_batches) > 1) == (tokens == 64)
    for one, many in zip(*found, strict=True):
        assert torch.allclose(one, many, atol=1e-6, rtol=1e-4)


def loop_of(recipe: Recipe, steps: int) -> Loop:
    """A training loop that has taken so many steps."""
    setup, model = build_setup(recipe)
    loop = Loop(setup, model, make_accelerator(recipe))
    for step, share in itertools.islice(loop.batches(), steps):
        loop.take_step(step, share, loop.step_totals(share), recipe.pretrain, 1.0)
        loop.progress.step = step + 1
    return loop


def test_dropout_is_a_function_of_seed_step_and_rank_alone(recipe: Recipe) -> None:
    loop = loop_of(recipe, 0)
    share = next(iter(loop.batches()))[1]

    def loss(step: int) -> float:
        # A learning rate of 0: the weights stay, and all that a loss can differ by is dropout.
        return float(loop.take_step(step, share, loop.step_totals(share), recipe.pretrain, 0.0)[0])

    first = loss(5)
    others = [loss(step) for step in (0, 1, 6, 7)]
    assert len({first, *others}) == 5
    torch.rand(7)
    assert loss(5) == first
    loop.ranks.rank = 1
    assert loss(5) not in (first, *others)
    loop.ranks.rank = 0
    loop.recipe = replace(recipe, seed=recipe.seed + 1)
    assert loss(5) not in (first, *others)
    loop.recipe = recipe
    assert loss(5) == first


def test_resume_restores_the_running_average(recipe: Recipe) -> None:
    averaged = replace(recipe, optimizer=replace(recipe.optimizer, ema_decay=0.9))
    loop = loop_of(averaged, 4)
    loop.checkpoints.save_last()
    setup, model = build_setup(averaged)
    checkpoint = Checkpoint(list_checkpoints(setup.run)[-1], setup.identity, Ranks())
    checkpoint.fill_model(model)
    again = Loop(setup, model, make_accelerator(averaged))
    assert checkpoint.restore(again.state()) == loop.progress
    pairs = zip(loop.engine.masters, again.engine.masters, strict=True)
    for number, (old, new) in enumerate(pairs):
        assert torch.equal(old, new)
        kept, found = loop.average.values[number], again.average.values[number]
        assert torch.equal(kept, found)
        assert not torch.equal(found, new)
        kept, found = loop.engine.optimizer.state[old], again.engine.optimizer.state[new]
        assert kept.keys() == found.keys()
        for key, values in kept.items():
            assert torch.equal(values, found[key]), key


def test_a_checkpoint_with_one_wrong_bit_is_refused(recipe: Recipe) -> None:
    outside = replace(recipe, optimizer=replace(recipe.optimizer, id_tables="row-adagrad"))
    loop_of(outside, 1).checkpoints.save_last()
    (folder,) = list_checkpoints(Path(recipe.run))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    for path in files:
        content = path.read_bytes()
        # In the last number, where neither the length nor the header of the file can tell.
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{path}: damaged or missing; resume from an older"):
            train(outside, resume="latest")
        path.write_bytes(content)
    Checkpoint(folder, {}, Ranks())


@pytest.mark.parametrize("keep", [1, 2])
def test_the_oldest_checkpoint_goes_only_after_the_new_one_has_its_name(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    loop = loop_of(replace(recipe, keep_checkpoints=keep), 0)
    run, real, seen = Path(recipe.run), os.rename, []

    def names() -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]

    def rename(source: Path, target: Path) -> None:
        before = names()
        real(source, target)
        seen.append((before, names()))

    monkeypatch.setattr(os, "rename", rename)
    for step in range(1, 5):
        seen.clear()
        loop.progress.step = step
        old = names()
        loop.checkpoints.save_last()
        # Nothing that was there is gone when the new one appears, and then no more than one goes.
        new, kept = [*old, step], [*old, step][-keep:]
        assert seen == [(old, new), *([(new, kept)] if kept != new else [])]
        assert names() == kept


def test_a_backbone_without_a_tokenizer_is_told_by_its_own_key(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    backbone = replace(recipe.model, backbone=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=rf"^model\.backbone {tmp_path}/empty: neither"):
        build_setup(replace(recipe, model=backbone))
    named = replace(recipe.tokens, tokenizer=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=rf"^tokens\.tokenizer {tmp_path}/empty: neither"):
        build_setup(replace(recipe, tokens=named))


@pytest.mark.dist
def test_two_ranks_train_what_one_trains(recipe: Recipe, tmp_path: Path) -> None:
    """Without dropout two gloo ranks and one process end with the same weights, up to the order of
    sums."""
    calm = replace(
        recipe,
        model=replace(recipe.model, dropout=0.0),
        finetune=replace(recipe.finetune, epochs=1),
        # AdamW would magnify rounding where gradients are almost zero.
        optimizer=replace(recipe.optimizer, eps=1e-4),
    )
    alone = weights(train(replace(calm, run=str(tmp_path / "alone"))))
    path = tmp_path / "two.yaml"
    path.write_text(dump_recipe(replace(calm, run=str(tmp_path / "two"))))
    for done in start_each(["-m", "genrec_dist.train", path], tmp_path / "logs", timeout=PATIENCE):
        assert done.returncode == 0, done.stderr
    started = events(tmp_path / "two", "start")[0]
    assert started["processes"] == 2
    assert "MULTI_CPU" in started["distributed_type"]
    together = weights(tmp_path / "two")
    for name, tensor in alone.items():
        assert torch.allclose(tensor, together[name], atol=2e-4), name
    one, two = ([e["loss"] for e in events(tmp_path / run, "step")] for run in ("alone", "two"))
    assert len(one) == len(two)
    assert np.allclose(one, two, rtol=1e-3)


def test_the_next_batch_is_received_while_this_one_is_worked_on() -> None:
    asked = []

    def source() -> Iterator[int]:
        for number in range(1, 4):
            asked.append(number)
            yield number
        raise ValueError("the shard is damaged")

    batches = ahead(source())
    assert next(batches) == 1
    deadline = time.monotonic() + 60
    while asked != [1, 2]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert [next(batches), next(batches)] == [2, 3]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)
    assert list(ahead([[], [5]])) == [[], [5]]


def test_deepspeed_that_is_asked_for_and_missing_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"is not installed: pip install 'genrec-dist\[zero\]'"):
        make_accelerator(recipe)
