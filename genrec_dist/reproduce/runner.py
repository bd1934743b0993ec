"""`genrec reproduce`: the steps one after another, and all finished rows written and printed."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from genrec_shards.atomic import write_json, write_text
from genrec_shards.file_lock import hold
from genrec_shards.sequences import read_sequences
from rich.console import Console
from rich.table import Table
from transformers.utils import cached_file

from genrec_dist.baselines import counting
from genrec_dist.config.load import load_recipe
from genrec_dist.distributed.deadline import Deadline, OutOfTime
from genrec_dist.estimate.forecast import forecast
from genrec_dist.estimate.hardware import card_named
from genrec_dist.estimate.sizes import BACKBONES
from genrec_dist.evaluation.provenance import hardware
from genrec_dist.inference.load import best_device
from genrec_dist.report.run_report import write_report
from genrec_dist.reproduce import result_rows, tables, train_process
from genrec_dist.reproduce.published import size_difference
from genrec_dist.reproduce.result_rows import Row, runs_file
from genrec_dist.reproduce.side_by_side import do_side_by_side
from genrec_dist.reproduce.steps import Step, check, steps_of
from genrec_dist.reproduce.systems import (
    PROTOCOLS,
    Options,
    ProtocolName,
    System,
    check_labels,
    chosen,
    label_of,
    systems_of,
)

ON_GPU, ON_CPU = "paper-base", "paper-tiny"
"""The recipe of the paper's own model where none is named."""
PAGE = "quality.md"


@dataclass(frozen=True)
class Work:
    """What is to be done, protocol by protocol."""

    options: Options
    systems: dict[ProtocolName, list[System]]
    steps: list[Step]
    notes: list[str]
    sizes: tuple[int, int]
    """Users and items of the file."""


def reproduce(options: Options, console: Console) -> bool:
    """Do the steps that are left, and write and print the finished rows.

    Returns:
        False where the minutes were over before the end.

    Raises:
        ValueError: For files, recipes and results that do not fit.
        Stopped: After a signal.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "genrec reproduce is one process that starts its trainings itself: start it without "
            "torchrun or accelerate launch"
        )
    with hold(options.out / ".lock", "another genrec reproduce works in this directory"):
        ending = Deadline(options.minutes)
        with ending.stop:
            work = plan(options)
            difference = size_difference(options.name, *work.sizes)
            if difference is not None and not options.any_size:
                raise ValueError(
                    f"{options.data}: {difference}: check the file, or go on with --any-size"
                )
            for note in work.notes:
                _say(console, note, "yellow")
            over, failed = None, None
            try:
                _do_steps(work, ending, console)
            except OutOfTime as out_of_time:
                over = out_of_time
            except ValueError as error:  # of steps side by side the others are done
                if options.parallel == 1:
                    raise
                failed = error
            _print_rows(work, console)
            if failed is not None:
                raise failed
            if over is not None:
                left = sum(not step.is_done() for step in work.steps)
                steps = f"{left} of {len(work.steps)} steps are left; the same command goes on"
                _say(console, f"{over}: {steps}")
            return over is None


def plan(options: Options) -> Work:
    """All steps, checked against what exists; nothing is written."""
    options, notes = _with_paper_recipe(options)
    check_labels(options)
    sequences = read_sequences(options.data)
    sizes = sequences.num_users, sequences.num_items
    difference = size_difference(options.name, *sizes)
    load_recipe(options.recipe, list(options.overrides_of(options.recipe)))
    paper, hybrid = (
        load_recipe(name, list(options.overrides_of(name)))
        for name in (options.paper_recipe, options.hybrid)
    )
    item_head, pretrains = bool(hybrid.model.item_loss), bool(paper.pretrain.epochs)
    if options.items is not None:
        notes = []  # of rows that are not made
    elif not item_head:
        notes.append(f"{options.hybrid} has no item head (model.item_loss): no row items")
    every = {
        protocol: systems_of(protocol, options, pretrains=pretrains, item_head=item_head)
        for protocol in PROTOCOLS
    }
    notes += [] if difference is None else [difference]
    names = {system.name for systems in every.values() for system in systems}
    systems: dict[ProtocolName, list[System]] = {}
    for protocol in options.protocols:
        systems[protocol] = chosen(every[protocol], options.systems, names)
    if "paper" in systems and counting.whole_numbers(sequences.item_ids) is None:
        systems["paper"] = [system for system in systems["paper"] if system.name != "counting"]
        notes.append(
            "the file's item ids are not distinct whole numbers: no row counting under the "
            "paper's protocol"
        )
    for path in _tables(options):  # refuse now what could not be merged later
        result_rows.read_quality(path)
        result_rows.read_quality(runs_file(path))
    steps: list[Step] = []
    for protocol, found in systems.items():
        check(options, protocol, found)
        steps += steps_of(options, protocol, found) if found else []
    return Work(options, systems, steps, notes, sizes)


def _with_paper_recipe(options: Options) -> tuple[Options, list[str]]:
    """The options with the device's recipe of the paper, from scratch where BART's weights cannot
    be had; and notes about it."""
    notes = []
    if not options.paper_recipe:
        on_gpu = best_device().type == "cuda"
        options = dataclasses.replace(options, paper_recipe=ON_GPU if on_gpu else ON_CPU)
        if not on_gpu:
            notes.append(
                f"the paper's own model on a CPU: recipe {ON_CPU}, far smaller than the paper's; "
                "--paper-recipe names another"
            )
    name = options.paper_recipe
    backbone = load_recipe(name, list(options.overrides_of(name))).model.backbone
    try:
        available = backbone is None or cached_file(backbone, "config.json") is not None
    except OSError:
        available = False
    if not available:
        label = label_of(name)
        notes.append(
            f"{backbone} cannot be had here: {label} starts from scratch in BART-base's shape, "
            "learning rate 1e-4"
        )
        # The paper's 1e-5 is for weights that have been trained already.
        shape = BACKBONES["facebook/bart-base"].shape
        own = [f"model.{key}={value}" for key, value in shape.items()]
        own += [f"{stage}.learning_rate=1e-4" for stage in ("pretrain", "finetune")]
        own = [f"{label}:{override}" for override in ("model.backbone=null", *own)]
        options = dataclasses.replace(options, overrides=(*own, *options.overrides))
    return options, notes


def render_plan(work: Work) -> Table:
    """`--dry-run`: each step, whether it is done, and the seconds it will take where they can be
    estimated."""
    table = Table("step", "state", "estimate")
    table.columns[2].justify = "right"
    for step in work.steps:
        if step.is_done():
            table.add_row(step.name, "done", "", style="dim")
        else:
            begun = step.run is not None and train_process.has_checkpoint(step.run)
            table.add_row(step.name, "begun" if begun else "to do", _estimate(step, work))
    return table


def _estimate(step: Step, work: Work) -> str:
    """Seconds of a training: as long as another seed took, or by `genrec plan` for a card whose
    peak is published."""
    if step.run is None or step.recipe is None:
        return ""
    runs = filter(train_process.is_finished, step.run.parent.glob("seed-*"))
    if others := list(map(train_process.worked_seconds, runs)):
        return f"{statistics.fmean(others):,.0f} s, as another seed"
    name = hardware()["gpu"] or ""
    card = card_named(name)
    if card is None:
        return ""
    try:
        recipe = step.recipe()
    except ValueError:  # the refit of a run that is not there yet
        return ""
    prepared = (Path(recipe.data) / "dataset.json").is_file()
    users, items = (None, None) if prepared else work.sizes
    found = forecast(recipe, users=users, items=items, card=card)
    seconds = sum(duration.total_seconds for duration in found.duration.values())
    return f"{seconds:,.0f} s, by genrec plan"


def do_step(options: Options, name: str, send: Callable[[str], None]) -> None:
    """Do the step of this name, as the process that `side_by_side` starts for it. Raises Stopped
    after a signal."""
    ending = Deadline()
    with ending.stop:
        (step,) = (step for step in plan(options).steps if step.name == name)
        step.work(ending, send)


def _do_steps(work: Work, ending: Deadline, console: Console) -> None:
    def done(step: Step, seconds: float) -> None:
        result_rows.note_step(work.options, step, seconds, hardware())
        if step.listed is not None:
            _write_tables(work)

    if work.options.parallel > 1:
        do_side_by_side(
            work.options, work.steps, do_step, ending, lambda text: _say(console, text), done
        )
        return
    for number, step in enumerate(work.steps, 1):
        if step.is_done():
            continue
        ending.check()
        _say(console, f"[{number}/{len(work.steps)}] {step.name}", "bold")
        start = time.monotonic()
        step.work(ending, lambda text: _say(console, f"  {text}"))
        if torch.cuda.is_available():  # the next training is another process's
            torch.cuda.empty_cache()
        done(step, time.monotonic() - start)


def _tables(options: Options) -> list[Path]:
    return [options.out / "quality.json", *([options.publish] if options.publish else [])]


def _write_tables(work: Work) -> dict[ProtocolName, list[Row]]:
    """Merge all finished rows into the tables, and return them."""
    options, rows = work.options, {}
    for protocol, systems in work.systems.items():
        if found := result_rows.rows_of(options, protocol, systems):
            rows[protocol] = found
    scores: dict[str, dict[str, Any]] = {}
    origins: dict[str, dict[str, Any]] = {}
    for protocol, found in rows.items():
        scores[protocol] = {row.name: row.scores() for row in found}
        origins[protocol] = {row.name: result_rows.origin_of(row, options) for row in found}
    for path in _tables(options) if rows else []:
        result_rows.merge(path, options.name, scores)
        result_rows.merge(runs_file(path), options.name, origins)
    return rows


def _print_rows(work: Work, console: Console) -> None:
    """Write and print all finished rows."""
    options, rows = work.options, _write_tables(work)
    for protocol, found in rows.items():
        console.print(tables.table_of(found, protocol, options.name))
        lines = tables.comparable(found, protocol, options.name)
        for a, b in tables.pairs_of(found):
            comparison, line = tables.compared(a, b)
            if comparison is not None:
                path = options.out / protocol / f"compare-{a.name}-{b.name}.json"
                write_json(path, comparison.as_dict())
            lines.append(line)
        lines += _report_of_best(found)
        for line in lines:
            _say(console, line)
        table = tables.markdown_of(found, protocol, options.name)
        listed = "\n".join(f"- {line}" for line in lines)
        page = f"## {protocol}\n\n`{options.command}`\n\n{table}\n\n{listed}\n"
        write_text(options.out / protocol / PAGE, page)
    if rows:
        # The page of the other protocol may come from another call.
        paths = [options.out / protocol / PAGE for protocol in PROTOCOLS]
        pages = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
        write_text(options.out / PAGE, "\n".join([f"# {options.name}\n", *pages]))
        _say(console, f"{options.out / 'quality.json'}: {sum(map(len, rows.values()))} rows")


def _report_of_best(rows: list[Row]) -> list[str]:
    """The report of the system that is best on validation, which refits have trained on."""
    scored = {}
    for row in rows:
        if row.system.kind == "recipe" and row.system.through == "n-2":
            lines = map(train_process.validated, row.runs)
            best = [max(line["NDCG@10"] for line in of_run) for of_run in lines if of_run]
            if best:  # a backbone as it is has no validation
                scored[statistics.fmean(best)] = row
    if not scored:
        return []
    row = scored[max(scored)]
    return [f"report of {row.name}, best on validation: {write_report(row.runs[0])}"]


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
