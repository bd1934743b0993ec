"""What is compared: the systems of each protocol, one row each. A further system is a line in
`systems_of`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from genrec_shards.splits import TrainedThrough

from genrec_dist.config.recipe import Recipe
from genrec_dist.decoding.searcher import Mode

ProtocolName = Literal["leak-free", "paper"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
RULES = ("popularity", "counting", "repeat", "knn")
BEST, HYBRID, ITEMS = "best", "hybrid", "items"
"""Rows of `--recipe` by the decoder, of `--hybrid` mixed and by the item head alone, whatever the
recipes are called."""
CONTROL = "sasrec+knn"
"""Hybrid's control: SASRec mixed with the same graph by the same grid."""
REFIT = "-n-1"
"""Ends the names of rows trained through t_{n-1}."""
WITHOUT, EQUAL = "-without-pretraining", "-equal-compute"
COMPARED: dict[str, tuple[str, ...]] = {
    BEST: ("knn", "sasrec"),
    HYBRID: (CONTROL, BEST),
    ITEMS: ("sasrec",),
}
"""Row -> the rows it is set beside, paired, where both are there."""
EXACT: Mode = "exact"
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
class Rule:
    """A baseline that learns little or nothing; one run, no seeds."""

    name: str
    baseline: str
    trained_through: TrainedThrough = "n-2"
    settings: tuple[str, ...] = ()
    """`key=value` of kNN."""


@dataclass(frozen=True)
class Sasrec:
    name: str
    settings: tuple[str, ...] = ()
    trained_through: TrainedThrough = "n-2"
    refit_of: Sasrec | None = None
    """The median of its seeds' best epochs is this one's number of epochs."""


@dataclass(frozen=True)
class Mixed:
    """A trained SASRec mixed with co-occurrence kNN, by weights chosen on validation."""

    name: str
    of: Sasrec

    @property
    def trained_through(self) -> TrainedThrough:
        return self.of.trained_through


@dataclass(frozen=True)
class Trained:
    """A recipe, trained once a seed, its lists made by the decoder."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    trained_through: TrainedThrough = "n-2"
    refit_of: Trained | None = None
    """The median of its seeds' best epochs is this one's number of epochs."""
    equal_compute: bool = False
    """Without pretraining, and with as many more epochs of finetuning as pretraining takes
    operations."""
    mode: Mode = "exact"
    beam: int | None = None
    """None: the recipe's `validation.beam`."""


@dataclass(frozen=True)
class Decoded:
    """The runs of another system, listed in another way."""

    name: str
    of: Trained
    mode: Mode
    beam: int | None = None
    tuned: bool = False
    """Mixed by weights that validation chooses, run by run."""

    @property
    def trained_through(self) -> TrainedThrough:
        return self.of.trained_through


System = Rule | Sasrec | Mixed | Trained | Decoded


@dataclass(frozen=True)
class Choices:
    """What decides the rows."""

    recipe: str = "best"
    paper_recipe: str = "paper-base"
    hybrid_recipe: str | None = None
    """None: `recipe`, if it has an item head."""
    overrides: tuple[str, ...] = ()
    """`key=value` of all recipes, or `RECIPE:key=value` of one."""
    sasrec: tuple[str, ...] = ()
    knn: tuple[str, ...] = ()
    """`key=value` of the row knn."""
    refit: bool = False
    readings: tuple[TrainedThrough, ...] = ("n-2",)
    """Of the paper's sentence on finetuning: is t_{n-1} a target of training?"""
    switches: bool = False

    def overrides_of(self, recipe: str) -> tuple[str, ...]:
        """What of `overrides` concerns this recipe."""
        found = []
        for override in self.overrides:
            key, colon, rest = override.partition(":")
            if not colon or "=" in key:
                found.append(override)
            elif key == label_of(recipe):
                found.append(rest)
        return tuple(found)


def label_of(recipe: str) -> str:
    """A recipe's name, or that of its file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def systems_of(
    protocol: ProtocolName, choices: Choices, *, recipe: Recipe, paper: Recipe, hybrid: Recipe
) -> list[System]:
    """All rows of a protocol, cheap ones first. `recipe`, `paper`, `hybrid`: the recipes of
    `choices`, resolved."""
    best = Trained(BEST, choices.recipe, choices.overrides_of(choices.recipe))
    found: list[System] = [
        Rule(name, name, settings=choices.knn if name == "knn" else ()) for name in RULES
    ]
    if protocol == "leak-free":
        sasrec = Sasrec("sasrec", choices.sasrec)
        found += [sasrec, Mixed(CONTROL, sasrec), best, *_hybrids(choices, best, hybrid)]
        if choices.refit:
            found += _refits(choices, sasrec, best)
    else:
        found.append(best)
    return found + _papers_own(choices, paper, protocol)


def _hybrids(choices: Choices, best: Trained, hybrid: Recipe) -> list[System]:
    """The decoder mixed with the transition graph, and with the item head where the recipe has one;
    and that head alone."""
    name = choices.hybrid_recipe or choices.recipe
    of = (
        best
        if name == choices.recipe
        else Trained(f"{HYBRID}-decoder", name, choices.overrides_of(name))
    )
    rows: list[System] = [Decoded(HYBRID, of, "hybrid", tuned=True)]
    rows += [Decoded(ITEMS, of, "items")] if hybrid.model.item_loss else []
    return rows if of is best else [of, *rows]


def _refits(choices: Choices, sasrec: Sasrec, best: Trained) -> list[System]:
    """The same, trained through t_{n-1}: rows of their own, never in one list with the others."""
    return [
        Rule("popularity" + REFIT, "popularity", "n-1"),
        Rule("knn" + REFIT, "knn", "n-1", choices.knn),
        Sasrec(sasrec.name + REFIT, sasrec.settings, "n-1", refit_of=sasrec),
        Trained(best.name + REFIT, best.recipe, best.overrides, "n-1", refit_of=best),
    ]


def _papers_own(choices: Choices, paper: Recipe, protocol: ProtocolName) -> list[System]:
    """The paper's model, its ablation of pretraining, and on its own protocol the published code's
    switches."""
    recipe, overrides = choices.paper_recipe, choices.overrides_of(choices.paper_recipe)
    name = label_of(recipe)
    mode, beam = ORIGINAL_DECODING if name == "original-code" else (EXACT, None)
    readings = choices.readings if protocol == "paper" else ("n-2",)
    found: list[System] = []
    for reading in readings:
        end = REFIT if reading == "n-1" else ""
        with_it = Trained(name + end, recipe, overrides, reading, mode=mode, beam=beam)
        found.append(with_it)
        if paper.pretrain.epochs:
            for more, equal in (("", False), (EQUAL, True)):
                row = f"{name}{WITHOUT}{more}{end}"
                without = (*overrides, "pretrain.epochs=0") if not equal else overrides
                found.append(
                    Trained(
                        row, recipe, without, reading, equal_compute=equal, mode=mode, beam=beam
                    )
                )
        if choices.switches and protocol == "paper" and reading == "n-2":
            found += _switched(with_it)
    return found


def _switched(of: Trained) -> list[System]:
    rows: list[System] = []
    for switch, sets in SWITCHES.items():
        name = f"{of.name}+{switch}"
        if switch == "free-decoding":
            rows.append(Decoded(name, of, *ORIGINAL_DECODING))
        else:
            rows.append(
                Trained(name, of.recipe, (*of.overrides, *sets), mode=of.mode, beam=of.beam)
            )
    return rows


def chosen(systems: list[System], names: list[str] | None, elsewhere: set[str]) -> list[System]:
    """The systems that are asked for by name; `elsewhere`: names that the other protocol has.
    Raises ValueError for others."""
    if names is None:
        return systems
    known = {system.name for system in systems}
    unknown = [name for name in names if name not in known | elsewhere]
    if unknown:
        raise ValueError(
            f"--systems {unknown[0]}: no such row here; there are {', '.join(sorted(known | elsewhere))}"
        )
    return [system for system in systems if system.name in names]
