"""`genrec reproduce`: the steps one behind another, and after each stop all that is finished,
told."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec_shards.atomic import atomic_file
from genrec_shards.file_lock import hold
from genrec_shards.sequences import read_sequences
from rich.console import Console
from rich.table import Table
from transformers.utils import cached_file

from genrec_dist.baselines import counting
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.deadline import Deadline, OutOfTime
from genrec_dist.estimate.forecast import forecast
from genrec_dist.estimate.hardware import CARDS
from genrec_dist.evaluation.compare import write_json
from genrec_dist.evaluation.provenance import hardware
from genrec_dist.inference.load import best_device
from genrec_dist.report.run_report import write_report
from genrec_dist.reproduce.layout import Place
from genrec_dist.reproduce.published import SetName, odd_sizes
from genrec_dist.reproduce.result_rows import (
    Row,
    check_mergeable,
    merge,
    note_step,
    rows_of,
    runs_file,
    told_of,
)
from genrec_dist.reproduce.steps import Step, check, steps_of
from genrec_dist.reproduce.systems import (
    PROTOCOLS,
    Choices,
    ProtocolName,
    System,
    Trained,
    chosen,
    label_of,
    systems_of,
)
from genrec_dist.reproduce.tables import comparable, compared, markdown_of, pairs_of, table_of
from genrec_dist.reproduce.train_process import is_finished, validated, worked_seconds

ON_GPU, ON_CPU = "paper-base", "paper-tiny"
"""The recipe of the paper's own model where none is named."""
PAGE = "quality.md"
FROM_SCRATCH = (
    "model.backbone=null", "model.d_model=768", "model.encoder_layers=6", "model.decoder_layers=6", "model.heads=12",
    "model.ffn=3072", "pretrain.learning_rate=1e-4", "finetune.learning_rate=1e-4",
)  # fmt: skip
"""BART-base's shape where its weights cannot be had; the paper's 1e-5 moves weights that have
learned already."""


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    name: SetName
    data: Path
    out: Path
    command: str
    """As it was given, without folders."""
    protocols: tuple[ProtocolName, ...] = PROTOCOLS
    systems: list[str] | None = None
    seeds: int = 3
    choices: Choices = field(default_factory=Choices)
    minutes: float | None = None
    publish: Path | None = None


@dataclass(frozen=True)
class Work:
    """What is to be done, protocol by protocol."""

    place: Place
    systems: dict[ProtocolName, list[System]]
    steps: list[Step]
    notes: list[str]


def reproduce(options: Options, console: Console) -> bool:
    """Do what is left of the steps and tell what is finished. False where the minutes were over
    before the end.

    Raises ValueError, one line, for files, recipes and results that do not fit, and Stopped after a
    signal."""
    _refuse_ranks()
    with hold(options.out / ".lock", "another genrec reproduce works in this directory"):
        ending = Deadline(options.minutes)
        with ending.stop:
            work = plan(options, console, ending)
            for note in work.notes:
                _say(console, note, "yellow")
            try:
                _work(options, work, console)
            except OutOfTime as over:
                left = sum(not step.is_done() for step in work.steps)
                _tell(options, work, console)
                _say(
                    console,
                    f"{over}: {left} of {len(work.steps)} steps are left; the same command goes on",
                )
                return False
            _tell(options, work, console)
            return True


def plan(options: Options, console: Console, ending: Deadline | None = None) -> Work:
    """All steps, checked against what is there; nothing is written."""
    choices, notes = _settled(options.choices)
    sequences = read_sequences(options.data)
    odd = odd_sizes(options.name, sequences.num_users, sequences.num_items)
    notes += [] if odd is None else [odd]
    place = Place(
        options.out,
        options.data,
        options.seeds,
        ending or Deadline(),
        lambda text: _say(console, f"  {text}"),
    )
    resolved = _recipes(choices)
    if not resolved["hybrid"].model.item_loss:
        notes.append(
            f"{choices.hybrid_recipe or choices.recipe} has no item head (model.item_loss): no row items"
        )
    systems: dict[ProtocolName, list[System]] = {
        protocol: systems_of(protocol, choices, **resolved) for protocol in PROTOCOLS
    }
    names = {protocol: {system.name for system in found} for protocol, found in systems.items()}
    picked: dict[ProtocolName, list[System]] = {}
    for protocol in options.protocols:
        elsewhere = set().union(*(names[other] for other in PROTOCOLS if other != protocol))
        picked[protocol] = chosen(systems[protocol], options.systems, elsewhere)
        if protocol == "paper" and counting.whole_numbers(sequences.item_ids) is None:
            picked[protocol] = [system for system in picked[protocol] if system.name != "counting"]
            notes.append(
                "the file's item ids are not distinct whole numbers: no row counting under the paper's protocol"
            )
    for path in _tables(options):
        check_mergeable(path)
        check_mergeable(runs_file(path))
    steps: list[Step] = []
    for protocol, found in picked.items():
        check(place, protocol, found)
        steps += steps_of(place, protocol, found) if found else []
    return Work(place, picked, steps, notes)


def render_plan(work: Work) -> Table:
    """`--dry-run`: each step, whether it is done, and the seconds it will take where that can be
    told."""
    table = Table("step", "state", "foretold")
    table.columns[2].justify = "right"
    for step in work.steps:
        state = "there" if step.is_done() else "begun" if step.is_begun() else "to do"
        table.add_row(
            step.name,
            state,
            "" if state == "there" else foretold(step, work),
            style="dim" if state == "there" else None,
        )
    return table


def foretold(step: Step, work: Work) -> str:
    """Seconds of a training: as long as another seed took, or by `genrec plan` for a card whose
    peak is published."""
    if step.run is None or step.recipe is None:
        return ""
    others = [worked_seconds(run) for run in step.run.parent.glob("seed-*") if is_finished(run)]
    if others:
        return f"{statistics.fmean(others):,.0f} s, as another seed"
    card = _card()
    if card is None:
        return ""
    try:
        recipe = step.recipe()
    except ValueError:  # the refit of a run that is not there yet
        return ""
    users, items = (
        (None, None) if (Path(recipe.data) / "dataset.json").is_file() else _sizes(work.place)
    )
    found = forecast(recipe, users=users, items=items, card=card)
    seconds = sum(duration.total_seconds for duration in found.duration.values())
    return f"{seconds:,.0f} s, by genrec plan"


def _sizes(place: Place) -> tuple[int, int]:
    sequences = read_sequences(place.source)
    return sequences.num_users, sequences.num_items


def _card() -> str | None:
    name = hardware()["gpu"]
    return None if name is None else next((card for card in CARDS if card in name), None)


def _settled(choices: Choices) -> tuple[Choices, list[str]]:
    """The choices with the device's recipe of the paper, from scratch where BART's weights cannot
    be had; and what to say of it."""
    notes = []
    if not choices.paper_recipe:
        on_gpu = best_device().type == "cuda"
        choices = dataclasses.replace(choices, paper_recipe=ON_GPU if on_gpu else ON_CPU)
        if not on_gpu:
            notes.append(
                f"the paper's own model on a CPU: recipe {ON_CPU}, far smaller than the paper's; --paper-recipe names another"
            )
    name = choices.paper_recipe
    backbone = load_recipe(name, list(choices.overrides_of(name))).model.backbone
    if backbone is not None and not _can_be_had(backbone):
        notes.append(
            f"{backbone} cannot be had here: {label_of(name)} starts from scratch in BART-base's shape, learning rate 1e-4"
        )
        own = tuple(f"{label_of(name)}:{override}" for override in FROM_SCRATCH)
        choices = dataclasses.replace(choices, overrides=own + choices.overrides)
    return choices, notes


def _can_be_had(backbone: str) -> bool:
    try:
        return cached_file(backbone, "config.json") is not None
    except OSError:
        return False


def _recipes(choices: Choices) -> dict[str, Recipe]:
    names = {
        "recipe": choices.recipe,
        "paper": choices.paper_recipe,
        "hybrid": choices.hybrid_recipe or choices.recipe,
    }
    return {
        kind: load_recipe(name, list(choices.overrides_of(name))) for kind, name in names.items()
    }


def _work(options: Options, work: Work, console: Console) -> None:
    steps, place = work.steps, work.place
    for number, step in enumerate(steps, 1):
        if step.is_done():
            continue
        place.ending.check()
        _say(console, f"[{number}/{len(steps)}] {step.name}", "bold")
        start = time.monotonic()
        step.work()
        note_step(place, step.name, step.listed, time.monotonic() - start, hardware())
        if step.listed is not None:
            _write(options, work)


def _tables(options: Options) -> list[Path]:
    return [options.out / "quality.json", *([options.publish] if options.publish else [])]


def _write(options: Options, work: Work) -> dict[ProtocolName, list[Row]]:
    """Merge all rows that are finished into the tables, and give them."""
    rows = {
        protocol: rows_of(work.place, protocol, systems)
        for protocol, systems in work.systems.items()
    }
    rows = {protocol: found for protocol, found in rows.items() if found}
    scores: dict[str, dict[str, Any]] = {}
    told: dict[str, dict[str, Any]] = {}
    for protocol, found in rows.items():
        scores[protocol] = {row.name: row.scores() for row in found}
        told[protocol] = {row.name: told_of(row, work.place, options.command) for row in found}
    for path in _tables(options) if rows else []:
        merge(path, options.name, scores)
        merge(runs_file(path), options.name, told)
    return rows


def _tell(options: Options, work: Work, console: Console) -> None:
    """Write and print all rows that are finished."""
    rows = _write(options, work)
    for protocol, found in rows.items():
        console.print(table_of(found, protocol, options.name))
        lines = (
            comparable(found, protocol, options.name)
            + _compared(options, protocol, found)
            + _reports(found)
        )
        for line in lines:
            _say(console, line)
        told = "\n".join(f"- {line}" for line in lines)
        part = f"## {protocol}\n\n`{options.command}`\n\n{markdown_of(found, protocol, options.name)}\n\n{told}\n"
        _put(options.out / protocol / PAGE, part)
    if rows:
        # What another call has told of the other protocol stays.
        parts = [options.out / protocol / PAGE for protocol in PROTOCOLS]
        pages = [part.read_text(encoding="utf-8") for part in parts if part.is_file()]
        _put(options.out / PAGE, "\n".join([f"# {options.name}\n", *pages]))
        _say(console, f"{options.out / 'quality.json'}: {sum(map(len, rows.values()))} rows")


def _put(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _compared(options: Options, protocol: ProtocolName, rows: list[Row]) -> list[str]:
    lines = []
    for a, b in pairs_of(rows):
        found, line = compared(a, b)
        if found is not None:
            write_json(found, options.out / protocol / f"compare-{a.name}-{b.name}.json")
        lines.append(line)
    return lines


def _reports(rows: list[Row]) -> list[str]:
    """The page of the system that is best on validation; refits have seen it."""
    scored = {
        statistics.fmean(max(line["NDCG@10"] for line in validated(run)) for run in row.runs): row
        for row in rows
        if isinstance(row.system, Trained) and row.system.trained_through == "n-2"
    }
    if not scored:
        return []
    best = scored[max(scored)]
    return [f"report of {best.name}, best on validation: {write_report(best.runs[0])}"]


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "genrec reproduce is one process that starts its trainings itself: start it without torchrun or accelerate launch"
        )
