"""The model card of a run: what it is, its data, its numbers beside the baselines, how to load
it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_info

from genrec_dist.config.hub import HubName, hub_library
from genrec_dist.config.paths import best_folder, recipe_of
from genrec_dist.model.causal.config import PROMPT_FILE
from genrec_dist.report.run_files import RunFiles, is_number, read_run_files
from genrec_dist.report.run_report import PROTOCOL, headline
from genrec_dist.report.score_tables import METRICS, interval_of, system_name, systems_of
from genrec_dist.report.svg import score

NOT_STATED = "not stated"


@dataclass(frozen=True)
class About:
    """What the card says and no file of a run knows."""

    license: str | None = None
    """Of the weights, by its identifier on the hub."""
    dataset: str | None = None
    """What the data is."""
    dataset_license: str | None = None


def model_card(run: Path, name: HubName, about: About) -> str:
    """The text of `README.md`, with the fields that the hub reads at its head.

    Args:
        run: Directory of `genrec train`; results of `genrec evaluate` are shown where there are
            any.
        name: Of the repository.
        about: What the run does not know.
    """
    files = read_run_files(run)
    metrics = next(iter(files.metrics.values()), {})
    parts = [
        _head(name, about, metrics),
        f"# {name.repo.partition('/')[2]}\n\n{_what(run)}",
        _numbers(metrics),
        _protocol(metrics),
        _data(run, files, about),
        _loading(run, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(name: HubName, about: About, metrics: dict[str, Any]) -> str:
    hub = hub_library()
    results = [
        hub.EvalResult(
            task_type="sequential-recommendation",
            dataset_type="sequences",
            dataset_name=about.dataset or NOT_STATED,
            metric_type=key,
            metric_value=round(metrics[key], 6),
            dataset_split=str(metrics.get("split", "")),
        )
        for key in METRICS
        if is_number(metrics.get(key))
    ]
    fields = hub.ModelCardData(
        license=about.license or "other",
        license_name=None if about.license else "not-stated",
        library_name="genrec-dist",
        tags=["sequential-recommendation", "generative-retrieval"],
        model_name=name.repo.partition("/")[2],
        eval_results=results or None,
    )
    return f"---\n{fields.to_yaml()}\n---"


def _what(run: Path) -> str:
    reads = "codes of the items"
    if (best_folder(run) / PROMPT_FILE).is_file():
        reads = "titles of the items"
    return (
        "A generative sequential recommender (GenRec): it reads a user's history and writes the "
        f"{reads} that come next, by a beam search over the catalogue. Trained with genrec-dist; "
        "`recipe.yaml` has every setting."
    )


def _numbers(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "## Results\n\nNot evaluated yet."
    rows = [
        f"| {system_name(name)} | " + " | ".join(_with_interval(row, key) for key in METRICS) + " |"
        for name, row in systems_of(metrics)
    ]
    users = f", {metrics['users']:,} users" if is_number(metrics.get("users")) else ""
    return (
        f"## Results on {metrics.get('split', 'an unnamed split')}{users}\n\n"
        f"{headline(metrics)}\n\n| system | {' | '.join(METRICS)} |\n"
        f"|---|{'---|' * len(METRICS)}\n"
        + "\n".join(rows)
        + "\n\nIn brackets: 95 % bootstrap intervals over users. All rows have the same users and "
        "the same protocol."
    )


def _with_interval(row: dict[str, Any], key: str) -> str:
    bounds = interval_of(row, key)
    shown = score(row[key] if is_number(row.get(key)) else None)
    return f"{shown} [{score(bounds[0])}, {score(bounds[1])}]" if bounds else shown


def _protocol(metrics: dict[str, Any]) -> str:
    protocol = metrics.get("protocol")
    if not isinstance(protocol, dict):
        return ""
    rows = [
        f"| {key.replace('_', ' ')} | {value} | {PROTOCOL.get(key, '')} |"
        for key, value in protocol.items()
        if value is not None and not isinstance(value, dict)
    ]
    return "\n".join(["## Protocol", "", "| | | |", "|---|---|---|", *rows])


def _data(run: Path, files: RunFiles, about: About) -> str:
    recipe = recipe_of(run)
    lines = [
        f"- data: {about.dataset or NOT_STATED}",
        f"- licence of the data: {about.dataset_license or NOT_STATED}",
    ]
    if recipe is not None and (Path(recipe.data) / "dataset.json").is_file():
        info = load_info(Path(recipe.data) / "dataset.json")
        lines.append(
            f"- {info.users:,} users, {info.items:,} items, {info.interactions:,} interactions; "
            f"split {info.split_name}"
        )
    if isinstance(files.audit.get("sentence"), str):
        lines.append(f"- audit: {files.audit['sentence']}")
    lines.append("- not in this repository: interactions, users, their ids")
    return "## Data\n\n" + "\n".join(lines)


def _loading(run: Path, name: HubName) -> str:
    recipe, address = recipe_of(run), HubName(name.repo, name.revision)
    kind = "AutoModelForSeq2SeqLM"
    if (best_folder(run) / PROMPT_FILE).is_file():
        kind = "AutoModelForCausalLM"
    is_hybrid = recipe is not None and recipe.decode == "hybrid"
    mode = ', mode="exact"' if is_hybrid else ""
    revision = f', revision="{name.revision}"' if name.revision else ""
    text = f"""## How to load

    from genrec_dist import Recommender

    recommender = Recommender.load("{address}"{mode})
    (answer,) = recommender.recommend([["ITEM", "ITEM"]], k=10)  # your item ids, oldest first

    genrec recommend {address} --history ITEM,ITEM{" --decode exact" if is_hybrid else ""}

With transformers alone; `import genrec_dist` makes it know the class:

    import genrec_dist
    from transformers import {kind}, AutoTokenizer

    model = {kind}.from_pretrained("{name.repo}"{revision})
    tokenizer = AutoTokenizer.from_pretrained("{name.repo}"{revision})"""
    if is_hybrid:
        text += (
            "\n\nThe results above are of `--decode hybrid`, which mixes the model with a graph of "
            "the interactions. They are not in this repository: give `--data DIR`, the directory "
            "of `genrec prepare`, for the same lists; `exact` lists by the model alone."
        )
    if recipe is not None and recipe.model.user_ids and not recipe.prompt.template:
        text += (
            "\n\nThe results above are of a model that knew its users by id. This copy has no "
            "table of users: it answers everyone as it answers an unknown user."
        )
    return text
