"""The steps from a file to the last row: each leaves its result under a final name and is skipped
where that exists."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_dataset, load_info
from genrec_shards.prepare import prepare
from genrec_shards.readers.documents import read_object
from genrec_shards.storage.manifest import file_sha256
from genrec_shards.storage.write import write_shards

from genrec_dist.baselines.leak_audit import write_audit
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec.run import sasrec_settings
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import MOVES_NO_GRADIENT, Recipe
from genrec_dist.config.used_settings import flat
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.data.item_graph import knn_settings
from genrec_dist.distributed.deadline import Deadline
from genrec_dist.estimate.forecast import forecast
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import LoadedRun, best_device, load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.tune_mixture import mixed_decoding, tune_mixture
from genrec_dist.reproduce.systems import NUMBERINGS, REFIT, Options, ProtocolName, System
from genrec_dist.reproduce.train_process import best_epoch, has_checkpoint, is_finished, train_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """A piece of work with a result of its own."""

    name: str
    is_done: Callable[[], bool]
    work: Callable[[Deadline, Say], None]
    run: Path | None = None
    """The run directory of a training."""
    recipe: Callable[[], Recipe] | None = None
    """The recipe of a training."""
    listed: Path | None = None
    """Where the metrics of an evaluation or a baseline go."""
    after: frozenset[str] = frozenset()
    """Names of the steps whose results this one needs, or that have to come before a look at
    test."""


def read_metrics(run: Path) -> dict[str, Any] | None:
    """The metrics of a run's evaluation on test; None where there is none yet."""
    path = run / "metrics-test.json"
    if not path.is_file():
        return None
    found = read_object(path, "a metrics file of this program", "remove it, and run again")
    try:
        {key: found[key] for key in ("protocol", "ci95", "users", "seconds", "recipe")}
    except KeyError as error:
        raise ValueError(
            f"{path}: not a metrics file of this program ({error}): remove it, and run again"
        ) from None
    return found


def check(options: Options, protocol: ProtocolName, systems: list[System]) -> None:
    """Compare what exists with what is requested. Raises ValueError where results were made of
    another file, by other recipes or other settings."""
    data = options.data_dir(protocol)
    marker = data / "dataset.json"
    if marker.is_file():
        info = load_info(marker)
        if info.source.sha256 != file_sha256(options.data):
            raise ValueError(
                f"{data} was made of another file than {options.data}: choose another --out"
            )
        texts = None if info.described_by is None else info.described_by.sha256
        if texts != (None if options.items is None else file_sha256(options.items)):
            made = "without --items" if texts is None else "with texts of another file"
            raise ValueError(f"{data} was made {made}: choose another --out")
    for system in systems:
        trained = system.of if system.kind == "ranked" and system.of else system
        for seed, run in enumerate(options.runs(protocol, trained)):
            if trained.kind == "recipe":
                # The epochs of a refit and of equal compute follow from other results.
                exists = (run / "recipe.yaml").is_file() and (
                    has_checkpoint(run) or is_finished(run)
                )
                if exists and not trained.equal_compute and trained.of is None:
                    _check_recipe(run, recipe_of(options, protocol, trained, seed))
            elif trained.kind == "sasrec" or trained.name.removesuffix(REFIT) == "knn":
                _check_baseline(run, trained)


def _check_recipe(run: Path, requested: Recipe) -> None:
    requested = resolve_recipe(requested, run)[0]
    kept = {
        key: value for key, value in requested.as_dict().items() if key not in MOVES_NO_GRADIENT
    }
    _check_equal(run, flat(load_recipe(run / "recipe.yaml").as_dict()), flat(kept))


def _check_baseline(run: Path, system: System) -> None:
    metrics = read_metrics(run)
    if metrics is None or not metrics["recipe"]:
        return
    found, settings = metrics["recipe"], list(system.settings)
    if system.kind == "sasrec":  # only what is given is held against a run
        stored = {key: value for key, value in found.items() if key != "best_epoch"}
        requested: Any = sasrec_settings(stored, settings)
    else:
        requested = knn_settings(settings)
    _check_equal(run, found, dataclasses.asdict(requested))


def _check_equal(run: Path, found: dict[str, Any], requested: dict[str, Any]) -> None:
    for key, value in requested.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"{run} was made with {key} {found[key]}, not {value}: choose another --out, or "
                "remove that run"
            )


def recipe_of(options: Options, protocol: ProtocolName, system: System, seed: int) -> Recipe:
    """The recipe of one run of a system of kind recipe. Raises ValueError for a refit where the
    runs that it refits are not finished."""
    run = options.runs(protocol, system)[seed]
    where = [f"data={options.data_dir(protocol)}", f"run={run}", "shards=null", f"seed={seed}"]
    where.append(f"trained_through={system.through}")
    recipe = load_recipe(system.recipe, [*system.settings, *where])
    if system.equal_compute:
        # Without pretraining, its operations are spent on more epochs of finetuning.
        plan = forecast(recipe)
        operations = {
            each.stage: plan.step_flops[each.stage] / each.batch_size * each.epoch_samples
            for each in plan.samples
        }
        more = round(recipe.pretrain.epochs * operations["pretrain"] / operations["finetune"])
        recipe = dataclasses.replace(
            recipe,
            pretrain=dataclasses.replace(recipe.pretrain, epochs=0),
            finetune=dataclasses.replace(recipe.finetune, epochs=recipe.finetune.epochs + more),
        )
    if system.through == "n-1":
        # The validation targets are training targets here, so the last epoch is kept, and nothing
        # stops before it.
        epochs = recipe.finetune.epochs
        if system.of is not None:
            runs = options.runs(protocol, system.of)
            epochs = statistics.median_low([best_epoch(run) for run in runs])
        every = max(epochs, 1)
        recipe = dataclasses.replace(
            recipe,
            finetune=dataclasses.replace(recipe.finetune, epochs=epochs),
            validation=dataclasses.replace(recipe.validation, every_epochs=every, patience=0),
        )
    return recipe


def steps_of(options: Options, protocol: ProtocolName, systems: list[System]) -> list[Step]:
    """All steps of a protocol in their order, each once."""
    data = options.data_dir(protocol)

    def prepare_data(ending: Deadline, say: Say) -> None:
        if not (data / "dataset.json").is_file():
            prepare(options.data, data, numbering=NUMBERINGS[protocol], items=options.items)
        say(write_audit(load_dataset(data)).sentence())

    def shard(ending: Deadline, say: Say) -> None:
        write_shards(load_dataset(data), data / "shards")

    manifest = data / "shards" / "manifest.json"
    steps = [
        Step(f"{protocol}: prepare", (data / "audit.json").is_file, prepare_data),
        Step(
            f"{protocol}: shard", manifest.is_file, shard, after=frozenset([f"{protocol}: prepare"])
        ),
    ]
    data_steps = _names(steps)
    for system in systems:
        steps += _system_steps(options, protocol, system, data_steps)
    return list({step.name: step for step in steps}.values())


def _names(steps: list[Step]) -> frozenset[str]:
    return frozenset(step.name for step in steps)


def _system_steps(
    options: Options, protocol: ProtocolName, system: System, after: frozenset[str]
) -> list[Step]:
    """What a row needs of another row, its trainings, and then the only looks at test: one per run
    and way of ranking, and none before all seeds are trained."""
    before: list[Step] = []
    if system.of is not None and system.of.kind == "recipe":
        before = _training_steps(options, protocol, system.of, after)
    elif system.of is not None:
        before = _system_steps(options, protocol, system.of, after)
    after |= _names(before)
    if system.kind == "recipe":
        before += _training_steps(options, protocol, system, after)
        after |= _names(before)
    by_decoder = system.kind in ("recipe", "ranked")
    weights, rows = [], []
    for seed, run in enumerate(options.runs(protocol, system)):
        name = f"{protocol}: {system.name}"
        name += "" if system.kind == "rule" else f", seed {seed}"
        if system.tuned:
            choose = partial(_choose_weights, options, protocol, system, seed)
            is_chosen = (run / mixture.FILE).is_file
            weights.append(Step(f"{name}: weights", is_chosen, choose, after=after))
        work = partial(_rank if by_decoder else _run_baseline, options, protocol, system, seed)
        name += ": test" if by_decoder else ""
        is_done, needs = partial(_is_evaluated, run), after | _names(weights)
        rows.append(Step(name, is_done, work, listed=run, after=needs))
    return [*before, *weights, *rows]


def _training_steps(
    options: Options, protocol: ProtocolName, system: System, after: frozenset[str]
) -> list[Step]:
    steps = []
    for seed, run in enumerate(options.runs(protocol, system)):
        recipe = partial(recipe_of, options, protocol, system, seed)
        name = f"{protocol}: {system.name}, seed {seed}: train"
        work = partial(_train, recipe)
        is_done = partial(is_finished, run)
        steps.append(Step(name, is_done, work, run=run, recipe=recipe, after=after))
    return steps


def _is_evaluated(run: Path) -> bool:
    return read_metrics(run) is not None


def _train(recipe_of_run: Callable[[], Recipe], ending: Deadline, say: Say) -> None:
    recipe = recipe_of_run()
    run = Path(recipe.run)
    if (run / "recipe.yaml").is_file() and has_checkpoint(run):
        _check_recipe(run, recipe)
    train_run(resolve_recipe(recipe, run)[0], ending, say)


def _run_baseline(
    options: Options, protocol: ProtocolName, system: System, seed: int, ending: Deadline, say: Say
) -> None:
    settings = list(system.settings)
    if system.kind == "sasrec":
        settings.append(f"seed={seed}")
        if system.of is not None:  # a refit; the steps of those runs come before
            metrics = map(read_metrics, options.runs(protocol, system.of))
            epochs = [found["recipe"]["best_epoch"] for found in metrics if found is not None]
            settings.append(f"epochs={statistics.median_low(epochs)}")
    elif system.of is not None:  # the control mixes the model that is a row of its own
        settings.append(f"model={options.runs(protocol, system.of)[seed]}")

    def epoch_ended(epoch: Any) -> None:
        say(str(epoch))
        ending.check()

    run_baseline(
        system.baseline or system.name.removesuffix(REFIT),
        load_dataset(options.data_dir(protocol)),
        "test",
        options.runs(protocol, system)[seed],
        trained_through=system.through,
        settings=settings,
        on_epoch=epoch_ended,
    )


def _opened(
    options: Options, protocol: ProtocolName, system: System, seed: int
) -> tuple[Recipe, LoadedRun, Decoding]:
    """A trained run, whose results go to the system's own directory, and how it is decoded."""
    out = options.runs(protocol, system)[seed]
    trained = out
    if system.kind == "ranked" and system.of is not None:
        trained = options.runs(protocol, system.of)[seed]
    recipe, run = load_recipe(trained / "recipe.yaml"), load_run(trained, best_device(), light=True)
    decoding = Decoding(
        beam=system.beam or recipe.validation.beam,
        mode=system.mode,
        exclude_history=run.model.config.exclude_history,
    )
    return recipe, dataclasses.replace(run, path=out), decoding


def _choose_weights(
    options: Options, protocol: ProtocolName, system: System, seed: int, ending: Deadline, say: Say
) -> None:
    recipe, run, decoding = _opened(options, protocol, system, seed)
    choice = tune_mixture(
        run,
        load_dataset(options.data_dir(protocol)),
        decoding=decoding,
        trained_through=recipe.trained_through,
        tune_graph=system.tune_graph,
        on_batch=lambda _: ending.check(),
    )
    say(str(choice))


def _rank(
    options: Options, protocol: ProtocolName, system: System, seed: int, ending: Deadline, say: Say
) -> None:
    recipe, run, decoding = _opened(options, protocol, system, seed)
    dataset = load_dataset(options.data_dir(protocol))
    if system.tuned:
        decoding = mixed_decoding(run, dataset, decoding, recipe.trained_through)
    evaluate(
        run,
        dataset,
        "test",
        decoding=decoding,
        trained_through=recipe.trained_through,
        recipe=recipe.as_dict(),
        on_batch=lambda _: ending.check(),
    )
    # Of a run that has come to its end; gigabytes at full size.
    shutil.rmtree(Path(recipe.run) / "checkpoints", ignore_errors=True)
