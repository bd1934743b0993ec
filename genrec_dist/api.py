"""The functions a notebook calls: prepare a log, train by a recipe, evaluate and compare runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genrec_shards.readers.read_log import TimeUnit
    from genrec_shards.splits import Split

    from genrec_dist.config.recipe import Recipe
    from genrec_dist.decoding.searcher import Mode
    from genrec_dist.evaluation.compare import Comparison


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    columns: Sequence[str] | None = None,
    time_unit: TimeUnit = "auto",
    items: str | Path | None = None,
    **options: Any,
) -> Path:
    """Turn a log into a data directory with its audit and shards, and return the directory.

    Args:
        source: the log, as `genrec prepare` takes it: a table, JSON lines, a folder of them, or
            sequences.
        out: the data directory.
        columns: those of user, item and time, where they have no usual names; places, such as
            ("0", "1", "3"), where the file has no line of names. None: by name.
        time_unit: of times that are numbers; "auto" is settled by the first of them.
        items: a table of the items' texts and titles.
        options: fields of `genrec_shards.prepare.PrepareOptions` by name, which are the options of
            `genrec prepare` (but for `--append`), such as `numbering`, `k_core`, `item_column` or
            `overwrite`; lists are tuples, as `levels=(64, 64)`.

    Raises:
        ValueError: one line with the file, for what cannot be read or does not go together.
    """
    from genrec_shards.prepare import prepare as run_prepare
    from genrec_shards.readers.read_log import LogOptions
    from genrec_shards.storage.write import write_shards

    from genrec_dist.baselines.leak_audit import write_audit

    log = LogOptions(None if columns is None else tuple(columns), time_unit)
    dataset = run_prepare(source, out, log=log, items=items, **options)
    write_audit(dataset)
    write_shards(dataset, dataset.path / "shards")
    return dataset.path


def train(recipe: Recipe | str | Path, *, resume: str | None = None) -> Path:
    """Train by a recipe, write the run's report, and return the run directory.

    Args:
        recipe: a recipe, the name of a shipped one, or the path of a YAML file; `load_recipe`
            takes `dotted.key=value` overrides, at least `data` and `run`.
        resume: "latest" or a checkpoint directory, to continue the run that is in `recipe.run`.

    Raises:
        ValueError: the recipe, the data or the run directory does not fit, with the remedy.
        genrec_dist.distributed.signals.NotFinite: the loss is no number; the message has the step.
        genrec_dist.distributed.signals.Stopped: a signal ended the run; a checkpoint is written.
    """
    from genrec_dist.config.load import load_recipe
    from genrec_dist.config.recipe import Recipe
    from genrec_dist.report.run_report import write_report
    from genrec_dist.training.run import train as run_train

    run = run_train(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), resume)
    write_report(run)
    return run


def evaluate(
    run: str | Path,
    split: Split = "test",
    *,
    data: str | Path | None = None,
    decode: Mode | None = None,
    beam: int = 20,
    out_dir: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Rank every user's items once, write metrics and lists, and return the metrics.

    Args:
        run: directory of `train`, or `hf://owner/name[@revision]`, which needs `data` and
            `out_dir`.
        split: "validation" or "test".
        data: directory of `genrec prepare`; None takes the one that the run was trained on.
        decode: the search mode, as `genrec evaluate --decode` (docs/decoding.md); None: as the
            run's recipe says. The weights of "hybrid" are chosen on validation first, where the run
            has none yet.
        beam: width of the beam.
        out_dir: where `metrics-SPLIT.json` and `top20-SPLIT.parquet` go; None: the run directory.
        device: "cpu" or "cuda"; None takes a GPU where there is one.

    Returns:
        What `metrics-SPLIT.json` holds: scores, 95 % intervals, the protocol, and the baselines on
        the same users under `beside`.

    Raises:
        ValueError: the data have another numbering or split than the run.
    """
    from genrec_shards.dataset import load_dataset

    from genrec_dist.config.hub import run_folder
    from genrec_dist.config.paths import data_of, required_recipe
    from genrec_dist.inference.evaluate import evaluate as run_evaluate
    from genrec_dist.inference.load import best_device, load_run
    from genrec_dist.inference.rank_users import Decoding
    from genrec_dist.inference.tune_mixture import chosen_decoding

    run = run_folder(run)
    recipe = required_recipe(run)
    dataset = load_dataset(data or data_of(run))
    loaded = load_run(run, best_device() if device is None else device, light=True)
    decoding = Decoding(
        beam=beam,
        mode=decode or recipe.decode,
        exclude_history=loaded.model.config.exclude_history,
    )
    if decoding.mode == "hybrid":
        decoding = chosen_decoding(
            loaded, dataset, decoding, recipe.trained_through, text=recipe.text
        )
    metrics = run_evaluate(
        loaded,
        dataset,
        split,
        decoding=decoding,
        trained_through=recipe.trained_through,
        recipe=recipe.as_dict(),
        out_dir=None if out_dir is None else Path(out_dir),
    )
    assert metrics is not None  # a single process is rank 0
    return metrics


def compare(
    run_a: str | Path, run_b: str | Path, split: Split = "test", *, resamples: int = 10_000
) -> Comparison:
    """Compare the lists of two runs by a paired bootstrap over users, and over seeds where there
    are several.

    Args:
        run_a: a run, or a folder of runs that are seeds of one recipe.
        run_b: what it is compared with.
        split: whose lists.
        resamples: of the bootstrap.

    Returns:
        A comparison: `verdict()` in words, `metrics` with the two values, their difference, its
        95 % interval and p by metric.

    Raises:
        ValueError: the runs do not share users, targets and protocol, or were not evaluated.
    """
    from genrec_dist.evaluation.compare import compare as run_compare

    return run_compare(run_a, run_b, split=split, resamples=resamples)
