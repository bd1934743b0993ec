"""The table of systems: one row per system of each protocol, and the options that choose them.

A further system is a line in `systems_of`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from genrec_shards.cleaning.published_sizes import SetName
from genrec_shards.splits import TrainedThrough

from genrec_dist.config.load import load_recipe
from genrec_dist.decoding.searcher import Mode

ProtocolName = Literal["leak-free", "paper"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
NUMBERINGS: dict[ProtocolName, Literal["random", "given"]] = {
    "leak-free": "random",
    "paper": "given",
}
RULES = ("popularity", "counting", "repeat", "knn")
REFIT = "-n-1"
"""Ends the names of rows trained through t_{n-1}."""
WITHOUT, EQUAL = "-without-pretraining", "-equal-compute"
COMPARED: dict[str, tuple[str, ...]] = {
    "best": ("knn", "sasrec"),
    "hybrid": ("sasrec+knn", "best"),
    "items": ("sasrec",),
    "auto": ("sasrec+knn", "knn"),
    "auto-soft-decoder": ("sasrec-soft", "auto-decoder"),
    "auto-soft": ("auto", "auto-soft-decoder"),
    "auto-text-decoder": ("sasrec-text",),
    "auto-text": ("sasrec-text+graph+text", "graph+text"),
    "llama": ("llama-untrained", "popularity"),
}
"""Row -> the rows it is compared with, paired, where both are finished."""
LORA = ("lora.rank=16", "lora.dropout=0.05")
"""The adapters of the row llama."""
SOFT = ("finetune.distill.weight=0.5",)
"""Soft targets: what the rows of recipe auto that are named soft have, and what recipe auto chooses
where items have texts."""
SOFT_ROWS = ("sasrec-soft", "auto-soft-decoder", "auto-soft")
"""Rows that are made where `systems` names one of them."""
TEXTS = ("model.item_text=add", *SOFT)
"""What recipe auto chooses where items have texts; named, since the control takes the same."""
ORIGINAL_DECODING: tuple[Mode, int] = ("free", 21)
"""How the published code decodes: no trie, 21 beams."""
SWITCHES: dict[str, tuple[str, ...]] = {
    "mask-last-biased": ("pretrain.mask={strategy: last-biased, p: 0.3}",),
    "pretrain-50-epochs": ("pretrain.epochs=50",),
    "warm-up-5-epochs-of-25": ("finetune.warmup_fraction=0.2",),
    "length-1024": ("model.max_tokens=1024",),
    "free-decoding": (),
}
"""Departures of the published code from the paper, each alone on top of the paper's recipe: name ->
what it sets."""


@dataclass(frozen=True)
class System:
    """One row of a table."""

    name: str
    kind: Literal["rule", "sasrec", "sasrec+knn", "recipe", "ranked"]
    """rule: a baseline without seeds. sasrec: trained once per seed. sasrec+knn: a trained SASRec
    mixed with kNN, or with the graph and texts, by weights chosen on validation. recipe: trained
    once per seed and ranked by its decoder. ranked: the runs of another recipe's row, ranked in
    another way."""
    settings: tuple[str, ...] = ()
    """`key=value` of the baseline, or of the recipe (`--set`)."""
    recipe: str = ""
    of: System | None = None
    """sasrec+knn, ranked: the row whose runs are used. A refit: the row whose median best epoch is
    its number of epochs."""
    through: TrainedThrough = "n-2"
    equal_compute: bool = False
    """No pretraining, and as many more epochs of finetuning as pretraining takes operations."""
    mode: Mode = "exact"
    beam: int | None = None
    """None: the recipe's `validation.beam`."""
    tuned: bool = False
    """Mixed by weights that validation chooses, run by run."""
    tune_graph: bool = False
    """The settings of the mixture's graph are chosen on validation, too."""
    baseline: str = ""
    """rule, sasrec, sasrec+knn: the baseline; empty where the row has its name."""


@dataclass(frozen=True)
class Options:
    """The options of `genrec reproduce`, and where they put each result."""

    name: SetName
    data: Path
    """The file of sequences."""
    out: Path
    items: Path | None = None
    """The table of the items' texts; the rows are then those that read them."""
    llama: str | None = None
    """Directory or hub name of the causal language model of the rows llama and llama-untrained,
    which are made where it is given."""
    command: str = "genrec reproduce"
    """As it was given, without directories: it is written into the results."""
    protocols: tuple[ProtocolName, ...] = PROTOCOLS
    systems: list[str] | None = None
    """Names of the rows to make; None: all."""
    seeds: int = 3
    recipe: str = "best"
    paper_recipe: str = ""
    """Empty: paper-base on a GPU, paper-tiny on a CPU."""
    hybrid_recipe: str | None = None
    """None: `recipe`."""
    overrides: tuple[str, ...] = ()
    """`key=value` of all recipes, or `RECIPE:key=value` of one."""
    sasrec: tuple[str, ...] = ()
    knn: tuple[str, ...] = ()
    refit: bool = False
    readings: tuple[TrainedThrough, ...] = ("n-2",)
    """Of the paper's sentence on finetuning: is t_{n-1} a target of training?"""
    switches: bool = False
    any_size: bool = False
    """Go on where the file has not the users and items of the paper's data set."""
    minutes: float | None = None
    parallel: int = 1
    """Steps side by side."""
    publish: Path | None = None

    @property
    def hybrid(self) -> str:
        """The recipe of the rows hybrid and items."""
        return self.hybrid_recipe or self.recipe

    def overrides_of(self, recipe: str) -> tuple[str, ...]:
        """The part of `overrides` that concerns this recipe."""
        found = []
        for override in self.overrides:
            label, colon, rest = override.partition(":")
            if not colon or "=" in label:
                found.append(override)
            elif label == label_of(recipe):
                found.append(rest)
        return tuple(found)

    def data_dir(self, protocol: ProtocolName) -> Path:
        """The prepared data directory of a protocol."""
        return self.out / protocol / "data"

    def runs(self, protocol: ProtocolName, system: System) -> list[Path]:
        """The run directories of a system, seed by seed."""
        folder = self.out / protocol / system.name
        if system.kind == "rule":
            return [folder]
        return [folder / f"seed-{seed}" for seed in range(self.seeds)]


def check_labels(options: Options) -> None:
    """Raises ValueError for an override of a recipe that no row has."""
    recipes = (options.recipe, options.hybrid, options.paper_recipe, "auto", "llama")
    labels = {label_of(recipe) for recipe in recipes}
    for override in options.overrides:
        label, colon, _ = override.partition(":")
        if colon and "=" not in label and label not in labels:
            known = ", ".join(sorted(labels))
            raise ValueError(f"--set {override}: no row is of recipe {label}: {known} are there")


def without_directory(word: object) -> str:
    """A word of the command, or `key=value`, where it is a path without its directories: it is
    written into files that travel. A name on the hub, `owner/name`, stays."""
    key, sign, value = str(word).rpartition("=")
    is_path = "/" in value and (value.startswith(("/", ".", "~")) or os.path.exists(value))
    return key + sign + (Path(value).name if is_path else value)


def label_of(recipe: str) -> str:
    """A recipe's name, or that of its file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def systems_of(
    protocol: ProtocolName, options: Options, *, pretrains: bool, item_head: bool
) -> list[System]:
    """All rows of a protocol, cheap ones first.

    Args:
        protocol: leak-free or paper.
        options: What was chosen; `paper_recipe` is set.
        pretrains: Whether the paper's recipe has a pretraining to leave out.
        item_head: Whether the recipe of the row hybrid has an item head.
    """
    rows = [System(name, "rule", options.knn if name == "knn" else ()) for name in RULES]
    if options.items is not None and protocol == "leak-free":
        return [*rows, *_text_rows(options), *_llama_rows(options)]
    best = System("best", "recipe", options.overrides_of(options.recipe), options.recipe)
    if protocol == "paper":
        return [*rows, best, *_paper_rows(protocol, options, pretrains)]
    sasrec = System("sasrec", "sasrec", options.sasrec)
    rows += [sasrec, System("sasrec+knn", "sasrec+knn", of=sasrec), best]
    decoder = best
    if options.hybrid != options.recipe:
        overrides = options.overrides_of(options.hybrid)
        decoder = System("hybrid-decoder", "recipe", overrides, options.hybrid)
        rows.append(decoder)
    rows.append(System("hybrid", "ranked", of=decoder, mode="hybrid", tuned=True))
    # Chosen here, seed by seed, in place of the end of training.
    fitted = (*options.overrides_of("auto"), "decode=exact")
    rows.append(System("auto-decoder", "recipe", fitted, "auto"))
    rows.append(System("auto", "ranked", of=rows[-1], mode="hybrid", tuned=True, tune_graph=True))
    if set(SOFT_ROWS) & set(options.systems or ()):
        rows += _soft_rows(options, SOFT, "soft")
    if item_head:
        rows.append(System("items", "ranked", of=decoder, mode="items"))
    if options.refit:  # rows of their own, never in one list with the others
        rows += [
            System("popularity" + REFIT, "rule", through="n-1"),
            System("knn" + REFIT, "rule", options.knn, through="n-1"),
            replace(sasrec, name="sasrec" + REFIT, through="n-1", of=sasrec),
            replace(best, name="best" + REFIT, through="n-1", of=best),
        ]
    return rows + _paper_rows(protocol, options, pretrains)


def _soft_rows(options: Options, settings: tuple[str, ...], name: str) -> list[System]:
    """Recipe auto with these settings, by its decoder and as a mixture, and first its control:
    SASRec with the same start, texts and soft targets. Raises ValueError where the overrides leave
    these out."""
    overrides = (*settings, *options.overrides_of("auto"))
    recipe = load_recipe("auto", list(overrides))
    model, distill = recipe.model, recipe.finetune.distill
    if not distill.weight or (settings == TEXTS and model.item_text == "none"):
        raise ValueError(
            f"--set: the row auto-{name} and its control have {' and '.join(settings)}: give "
            "finetune.distill.weight another number, and leave model.item_text out"
        )
    same: dict[str, object] = {"init_items": model.init_items}
    if settings == TEXTS:
        same |= {"item_text": model.item_text, "item_text_source": model.item_text_source}
        same |= {"text": recipe.text}
    same |= {f"distill.{field.name}": getattr(distill, field.name) for field in fields(distill)}
    controls = (*(f"{key}={value}" for key, value in same.items()), *options.sasrec)
    decoder = System(f"auto-{name}-decoder", "recipe", (*overrides, "decode=exact"), "auto")
    return [
        System(f"sasrec-{name}", "sasrec", controls, baseline="sasrec"),
        decoder,
        System(f"auto-{name}", "ranked", of=decoder, mode="hybrid", tuned=True, tune_graph=True),
    ]


def _text_rows(options: Options) -> list[System]:
    """Untrained texts, what recipe auto is on data with texts, and its control, alone and in a
    mixture of the same kind."""
    sasrec, *recipe = _soft_rows(options, TEXTS, "text")
    mixed = System("sasrec-text+graph+text", "sasrec+knn", of=sasrec, baseline="sasrec+graph+text")
    return [System("graph+text", "rule"), sasrec, mixed, *recipe]


def _llama_rows(options: Options) -> list[System]:
    """A language model that reads titles: as it is, and trained by adapters (Ji et al., arXiv
    2307.00457)."""
    if options.llama is None:
        return []
    backbone, overrides = f"model.backbone={options.llama}", options.overrides_of("llama")
    as_it_is = (backbone, *overrides, "lora.rank=0", "finetune.epochs=0")
    return [
        System("llama-untrained", "recipe", as_it_is, "llama"),
        System("llama", "recipe", (backbone, *LORA, *overrides), "llama"),
    ]


def _paper_rows(protocol: ProtocolName, options: Options, pretrains: bool) -> list[System]:
    """The paper's model, its ablation of pretraining, and under its own protocol the published
    code's switches."""
    recipe = options.paper_recipe
    overrides, label = options.overrides_of(recipe), label_of(recipe)
    model = System(label, "recipe", overrides, recipe)
    if label == "original-code":
        model = replace(model, mode=ORIGINAL_DECODING[0], beam=ORIGINAL_DECODING[1])
    rows = []
    for reading in options.readings if protocol == "paper" else ("n-2",):
        end = REFIT if reading == "n-1" else ""
        rows.append(replace(model, name=label + end, through=reading))
        if pretrains:
            without = replace(rows[-1], name=label + WITHOUT + end)
            rows.append(replace(without, settings=(*overrides, "pretrain.epochs=0")))
            rows.append(replace(without, name=label + WITHOUT + EQUAL + end, equal_compute=True))
        if options.switches and protocol == "paper" and reading == "n-2":
            for switch, sets in SWITCHES.items():
                row = replace(model, name=f"{label}+{switch}", settings=(*overrides, *sets))
                if switch == "free-decoding":
                    mode, beam = ORIGINAL_DECODING
                    row = System(row.name, "ranked", of=model, mode=mode, beam=beam)
                rows.append(row)
    return rows


def chosen(systems: list[System], names: list[str] | None, elsewhere: set[str]) -> list[System]:
    """The systems with these names (None: all). `elsewhere`: names that the other protocol has.
    Raises ValueError for a name of no system."""
    if names is None:
        return systems
    known = {system.name for system in systems} | elsewhere
    unknown = [name for name in names if name not in known]
    if unknown:
        rows = ", ".join(sorted(known))
        raise ValueError(f"--systems {unknown[0]}: no such row here; there are {rows}")
    return [system for system in systems if system.name in names]
