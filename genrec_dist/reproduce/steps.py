"""The steps from a file to the last row: each leaves its result under a final name and is skipped
where that is there."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards

from genrec_dist.baselines.leak_audit import write_audit
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec_model import SasrecSettings
from genrec_dist.baselines.sasrec_run import sasrec_settings
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.item_graph import knn_settings
from genrec_dist.estimate.forecast import forecast
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import LoadedRun, best_device, load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.tune_mixture import mixed_decoding, tune_mixture
from genrec_dist.reproduce.layout import NUMBERINGS, Place, read_metrics
from genrec_dist.reproduce.systems import (
    Decoded,
    Mixed,
    ProtocolName,
    Rule,
    Sasrec,
    System,
    Trained,
)
from genrec_dist.reproduce.train_process import (
    best_epoch,
    check_same,
    is_begun,
    is_finished,
    train_run,
)


@dataclass(frozen=True)
class Step:
    """A piece of work with a result of its own."""

    name: str
    is_done: Callable[[], bool]
    work: Callable[[], None]
    is_begun: Callable[[], bool] = lambda: False
    """Is something there to go on from?"""
    recipe: Callable[[], Recipe] | None = None
    """Of a training."""
    run: Path | None = None
    """Of a training."""
    listed: Path | None = None
    """Where the metrics of an evaluation or a baseline go."""


def steps_of(place: Place, protocol: ProtocolName, systems: list[System]) -> list[Step]:
    """All steps of a protocol in their order, each once."""
    steps = _data_steps(place, protocol)
    for system in systems:
        steps += _steps(place, protocol, system)
    return list({step.name: step for step in steps}.values())


def check(place: Place, protocol: ProtocolName, systems: list[System]) -> None:
    """Raise ValueError where what is there was made of other data, by other recipes or other
    settings than asked for."""
    place.check_source(protocol)
    for system in systems:
        trained = system.of if isinstance(system, Decoded) else system
        if isinstance(trained, Trained) and not trained.equal_compute and trained.refit_of is None:
            for seed, run in enumerate(place.runs(protocol, trained)):
                check_same(run, recipe_of(place, protocol, trained, seed))
        if isinstance(trained, Sasrec):
            for run in place.runs(protocol, trained):
                _check_settings(run, trained.settings)
        if isinstance(trained, Rule) and trained.baseline == "knn":
            _check_knn(place.runs(protocol, trained)[0], trained.settings)


def recipe_of(place: Place, protocol: ProtocolName, system: Trained, seed: int) -> Recipe:
    """The recipe of one run. A refit's needs the run that it refits."""
    run = place.runs(protocol, system)[seed]
    where = [f"data={place.data(protocol)}", f"run={run}", "shards=null", f"seed={seed}"]
    recipe = load_recipe(
        system.recipe, [*system.overrides, *where, f"trained_through={system.trained_through}"]
    )
    if system.equal_compute:
        recipe = _with_equal_compute(recipe)
    if system.trained_through == "n-1":
        return _without_validation(recipe, place, protocol, system)
    return recipe


def _without_validation(
    recipe: Recipe, place: Place, protocol: ProtocolName, system: Trained
) -> Recipe:
    """The validation targets are training targets here, so the last epoch is kept, and nothing
    stops before it."""
    epochs = recipe.finetune.epochs
    if system.refit_of is not None:
        epochs = statistics.median_low(
            [best_epoch(run) for run in place.runs(protocol, system.refit_of)]
        )
    finetune = dataclasses.replace(recipe.finetune, epochs=epochs)
    validation = dataclasses.replace(recipe.validation, every_epochs=max(epochs, 1), patience=0)
    return dataclasses.replace(recipe, finetune=finetune, validation=validation)


def _with_equal_compute(recipe: Recipe) -> Recipe:
    """Without pretraining, its operations spent on more epochs of finetuning instead."""
    plan = forecast(recipe)
    operations = {
        each.stage: plan.step_flops[each.stage] / each.batch_size * each.epoch_samples
        for each in plan.samples
    }
    more = round(recipe.pretrain.epochs * operations["pretrain"] / operations["finetune"])
    return dataclasses.replace(
        recipe,
        pretrain=dataclasses.replace(recipe.pretrain, epochs=0),
        finetune=dataclasses.replace(recipe.finetune, epochs=recipe.finetune.epochs + more),
    )


def _data_steps(place: Place, protocol: ProtocolName) -> list[Step]:
    data = place.data(protocol)
    return [
        Step(
            f"{protocol}: prepare",
            (data / "audit.json").is_file,
            partial(_prepare, place, protocol),
        ),
        Step(
            f"{protocol}: shard",
            (data / "shards" / "manifest.json").is_file,
            partial(_shard, place, protocol),
        ),
    ]


def _prepare(place: Place, protocol: ProtocolName) -> None:
    data = place.data(protocol)
    if not (data / "dataset.json").is_file():
        prepare(place.source, data, numbering=NUMBERINGS[protocol])
    place.say(write_audit(place.dataset(protocol)).sentence())


def _shard(place: Place, protocol: ProtocolName) -> None:
    write_shards(place.dataset(protocol), place.data(protocol) / "shards")


def _steps(place: Place, protocol: ProtocolName, system: System) -> list[Step]:
    before = (
        _trainings(place, protocol, system.refit_of)
        if isinstance(system, Trained) and system.refit_of
        else []
    )
    if isinstance(system, Trained):
        return [
            *before,
            *_trainings(place, protocol, system),
            *_evaluations(place, protocol, system),
        ]
    if isinstance(system, Decoded):
        steps = _trainings(place, protocol, system.of)
        for seed, run in enumerate(place.runs(protocol, system) if system.tuned else ()):
            name, path = _name(protocol, system, seed, "weights"), run / mixture.FILE
            steps.append(Step(name, path.is_file, partial(_tune, place, protocol, system, seed)))
        return [*steps, *_evaluations(place, protocol, system)]
    if isinstance(system, Sasrec) and system.refit_of is not None:
        before = _steps(place, protocol, system.refit_of)
    if isinstance(system, Mixed):
        before = _steps(place, protocol, system.of)
    work = _rule if isinstance(system, Rule) else _mixed if isinstance(system, Mixed) else _sasrec
    return before + [
        Step(
            _name(protocol, system, seed),
            partial(_is_evaluated, run),
            partial(work, place, protocol, system, seed),  # type: ignore[arg-type]
            listed=run,
        )
        for seed, run in enumerate(place.runs(protocol, system))
    ]


def _name(protocol: str, system: System, seed: int, what: str = "") -> str:
    where = f"{protocol}: {system.name}" + ("" if isinstance(system, Rule) else f", seed {seed}")
    return f"{where}: {what}" if what else where


def _trainings(place: Place, protocol: ProtocolName, system: Trained) -> list[Step]:
    return [
        Step(
            _name(protocol, system, seed, "train"),
            partial(is_finished, run),
            partial(_train, place, protocol, system, seed),
            partial(is_begun, run),
            partial(recipe_of, place, protocol, system, seed),
            run,
        )
        for seed, run in enumerate(place.runs(protocol, system))
    ]


def _evaluations(place: Place, protocol: ProtocolName, system: Trained | Decoded) -> list[Step]:
    """The only looks at test: one a run and way of listing, and none before all seeds are
    trained."""
    return [
        Step(
            _name(protocol, system, seed, "test"),
            partial(_is_evaluated, run),
            partial(_evaluate, place, protocol, system, seed),
            listed=run,
        )
        for seed, run in enumerate(place.runs(protocol, system))
    ]


def _is_evaluated(run: Path) -> bool:
    return read_metrics(run) is not None


def _train(place: Place, protocol: ProtocolName, system: Trained, seed: int) -> None:
    train_run(recipe_of(place, protocol, system, seed), place.ending, place.say)


def _rule(place: Place, protocol: ProtocolName, system: Rule, seed: int) -> None:
    out = place.runs(protocol, system)[seed]
    run_baseline(
        system.baseline, place.dataset(protocol), "test", out, trained_through=system.trained_through,
        settings=list(system.settings),
    )  # fmt: skip


def _sasrec(place: Place, protocol: ProtocolName, system: Sasrec, seed: int) -> None:
    run = place.runs(protocol, system)[seed]
    settings = [*system.settings, f"seed={seed}"]
    if system.refit_of is not None:
        found = [read_metrics(run) for run in place.runs(protocol, system.refit_of)]
        # Their steps come before.
        epochs = statistics.median_low(
            [metrics["recipe"]["best_epoch"] for metrics in found if metrics is not None]
        )
        settings.append(f"epochs={epochs}")

    def ended(epoch: Any) -> None:
        place.say(str(epoch))
        place.ending.check()

    run_baseline(
        "sasrec", place.dataset(protocol), "test", run, trained_through=system.trained_through, settings=settings,
        on_epoch=ended,
    )  # fmt: skip


def _mixed(place: Place, protocol: ProtocolName, system: Mixed, seed: int) -> None:
    """The model is the one that stands as a row of its own; the weights are chosen on validation
    first."""
    out, model = place.runs(protocol, system)[seed], place.runs(protocol, system.of)[seed]
    run_baseline(
        system.name, place.dataset(protocol), "test", out, trained_through=system.trained_through, settings=[f"model={model}"]
    )  # fmt: skip


def _check_settings(run: Path, settings: tuple[str, ...]) -> None:
    metrics = read_metrics(run)
    if metrics is None:
        return
    knobs = {field.name for field in dataclasses.fields(SasrecSettings)}
    stored = {key: value for key, value in metrics["recipe"].items() if key in knobs}
    asked = dataclasses.asdict(sasrec_settings(dict(stored), list(settings)))
    for key, value in stored.items():
        if asked[key] != value:
            raise ValueError(
                f"{run} was trained with {key} {value}, not {asked[key]}: choose another --out"
            )


def _check_knn(run: Path, settings: tuple[str, ...]) -> None:
    metrics = read_metrics(run)
    if metrics is None or not metrics["recipe"]:
        return
    for key, value in dataclasses.asdict(knn_settings(list(settings))).items():
        if metrics["recipe"].get(key, value) != value:
            raise ValueError(
                f"{run}: its lists were made with {key} {metrics['recipe'][key]}, not {value}: remove it, or choose another --out"
            )


def _decoding(system: Trained | Decoded, recipe: Recipe, run: LoadedRun) -> Decoding:
    return Decoding(
        beam=system.beam or recipe.validation.beam,
        mode=system.mode,
        exclude_history=run.model.config.exclude_history,
    )


def _evaluate(place: Place, protocol: ProtocolName, system: Trained | Decoded, seed: int) -> None:
    out = place.runs(protocol, system)[seed]
    trained = out if isinstance(system, Trained) else place.trained(protocol, system, seed)
    recipe = load_recipe(trained / "recipe.yaml")
    run = load_run(trained, best_device())
    decoding = _decoding(system, recipe, run)
    listed = dataclasses.replace(run, path=out)
    if isinstance(system, Decoded) and system.tuned:
        decoding = mixed_decoding(listed, place.dataset(protocol), decoding, recipe.trained_through)
    evaluate(
        listed,
        place.dataset(protocol),
        "test",
        decoding=decoding,
        trained_through=recipe.trained_through,
        recipe=recipe.as_dict(),
        on_batch=lambda _: place.ending.check(),
    )
    # Of a run that has come to its end; gigabytes at full size.
    shutil.rmtree(trained / "checkpoints", ignore_errors=True)
    del run, listed
    if torch.cuda.is_available():  # the next training is another process's
        torch.cuda.empty_cache()


def _tune(place: Place, protocol: ProtocolName, system: Decoded, seed: int) -> None:
    """Choose the weights of a mixture on validation; they go where the lists will."""
    trained = place.trained(protocol, system, seed)
    recipe = load_recipe(trained / "recipe.yaml")
    run = load_run(trained, best_device())
    decoding = _decoding(system, recipe, run)
    choice = tune_mixture(
        dataclasses.replace(run, path=place.runs(protocol, system)[seed]),
        place.dataset(protocol),
        decoding=decoding,
        trained_through=recipe.trained_through,
        on_batch=lambda _: place.ending.check(),
    )
    place.say(choice.told())
