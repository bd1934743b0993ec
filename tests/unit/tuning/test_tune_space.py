"""The space of a sweep: refused in one line before anything starts, sampled by seed, conditional
keys only where they apply."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from genrec_tuning.record import Epoch, Sweep, Trial, trial_id
from genrec_tuning.space import Space, load_space, planned_epochs, points, recipe_of, refuse_changes
from places import ROOT

BASE = """
data: data
run: run
model: {d_model: 16, heads: 2}
pretrain: {epochs: 1}
finetune: {epochs: 4}
"""
SPACE = """
base: base.yaml
set: {finetune.batch_size: 32}
trials: 6
space:
  finetune.learning_rate: {loguniform: [3.0e-4, 5.0e-3]}
  pretrain.mask.strategy:
    choice:
      single: {}
      last-biased: {pretrain.mask.p: {uniform: [0.2, 0.9]}}
      recency: {pretrain.mask.p: {uniform: [0.05, 0.5]}}
      multi: {pretrain.mask.k: {int: [2, 6]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def space_of(folder: Path, text: str = SPACE) -> Space:
    (folder / "space.yaml").write_text(text)
    return load_space(folder / "space.yaml")


def test_a_space_is_read_with_its_recipe(folder: Path) -> None:
    space = space_of(folder)
    assert (space.search, space.scheduler, space.grace, space.reduction, space.keep) == (
        "optuna",
        "asha",
        2,
        3,
        3,
    )
    assert space.recipe["finetune"]["batch_size"] == 32
    assert Path(space.recipe["data"]).is_absolute()
    assert planned_epochs(space.recipe_of({}, "run")) == 4
    known = json.loads(json.dumps(space.as_dict()))
    assert known["space"]["finetune.learning_rate"] == {"loguniform": [3e-4, 5e-3]}
    assert known["space"]["pretrain.mask.strategy"]["choice"]["multi"] == {
        "pretrain.mask.k": {"int": [2, 6]}
    }
    values = {
        "pretrain.mask.strategy": "multi",
        "pretrain.mask.k": 3,
        "finetune.learning_rate": 1e-3,
    }
    recipe = recipe_of(known, values, "runs/x")
    assert (recipe.pretrain.mask.k, recipe.finetune.learning_rate, recipe.run) == (
        3,
        1e-3,
        "runs/x",
    )


def test_the_corners_that_are_tried_are_all_of_them(folder: Path) -> None:
    found = list(points(space_of(folder).space))
    assert len(found) == 2 * (1 + 2 + 2 + 2)
    assert {
        "finetune.learning_rate": 5e-3,
        "pretrain.mask.strategy": "recency",
        "pretrain.mask.p": 0.05,
    } in found


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("trials: 6", "trails: 6", r"space\.yaml: unknown key trails; known here: base, set"),
        ("trials: 6", "trials: 0", r"trials: 0 is no whole number from 1 on"),
        ("trials: 6", "search: grid", r"search: 'grid' is none of optuna, random"),
        ("base.yaml", "nosuch", r"nosuch: no such recipe file; shipped recipes: "),
        ("trials: 6", "trials: [", r"space\.yaml: not YAML"),
        ("finetune.learning_rate", "finetune.learning_rat", r"space: finetune\.learning_rat: .*unknown key"),
        ("finetune.batch_size", "finetune.batch", r"set: finetune\.batch: .*unknown key finetune\.batch"),
        ("batch_size: 32", "batch_size: 0", r"set: finetune\.batch_size: .* it has to be 1 or above"),
        ("uniform: [0.2, 0.9]", "uniform: [0.2, 1.9]", r"space: pretrain\.mask\.p: 1\.9 is refused: .*at most 1"),
        ("int: [2, 6]", "int: [0, 6]", r"space: pretrain\.mask\.k: 0 is refused: .*1 or above"),
        ("int: [2, 6]", "int: [2.5, 6]", r"pretrain\.mask\.k: int: \[2\.5, 6\] are no whole numbers"),
        ("int: [2, 6]", "int: [6, 2]", r"the first has to be below the second"),
        ("int: [2, 6]", "int: 4", r"int: 4 is no list of lowest and highest"),
        ("      multi:", "      several:", r"space: pretrain\.mask\.strategy: \"several\" is refused"),
        ("loguniform: [3.0e-4", "loguniform: [0", r"a logarithm needs numbers above 0"),
        ("loguniform: [3.0e-4, 5.0e-3]", "choice: []", r"learning_rate: choice: \[\]: nothing to choose from"),
        ("loguniform: [3.0e-4, 5.0e-3]", "choice: [1.0e-3, 1.0e-3]", r"a value is there twice"),
        ("loguniform: [3.0e-4, 5.0e-3]", "range: [1, 2]", r"is not one of uniform, loguniform, int, logint, choice"),
        ("finetune.batch_size: 32", "finetune.learning_rate: 1", r"space: finetune\.learning_rate is in set and in space"),
        ("single: {}", "single: {finetune.learning_rate: {uniform: [1, 2]}}", r"finetune\.learning_rate is in a key above"),
        ("finetune.learning_rate", "run", r"space: run: each trial has a run directory of its own"),
        ("trials: 6", "resources_per_trial: {cpus: 1}", r"unknown key cpus; known here: cpu, gpu, processes"),
        ("trials: 6", "resources_per_trial: {gpu: 1, processes: 2}", r"each process takes one GPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    folder: Path, before: str, after: str, message: str
) -> None:
    assert before in SPACE
    with pytest.raises(ValueError, match=message) as caught:
        space_of(folder, SPACE.replace(before, after, 1))
    assert str(caught.value).startswith(str(folder / "space.yaml"))
    assert "\n" not in str(caught.value)


def test_keys_that_do_not_go_together_are_refused(folder: Path) -> None:
    """No key is wrong alone: 24 is no multiple of 16 heads."""
    text = "base: base.yaml\nspace:\n  model.d_model: {choice: [16, 24]}\n  model.heads: {choice: [2, 16]}\n"
    with pytest.raises(
        ValueError, match=r"model\.heads: 16 is refused|model\.d_model: 24 is refused"
    ):
        space_of(folder, text)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tuning" / "spaces").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_spaces_are_good(path: Path) -> None:
    assert load_space(path).trials >= 4


def sampled(
    space: Space, known: tuple[Trial, ...] = (), scores: bool = True, upto: int | None = None
) -> list[Trial]:
    """What the search gives one after another, each told a score made of its values."""
    from genrec_tuning.search import Search
    from genrec_tuning.trial import METRIC

    def config(number: int, values: dict[str, Any]) -> dict[str, Any]:
        return {"number": number, "values": values}

    search = Search(space, Sweep("s", space.as_dict(), known), config)
    found = []
    for turn in range((upto or space.trials) - sum(trial.status == "finished" for trial in known)):
        given = search.suggest(f"ray-{turn}")
        assert given is not None
        score = given["values"]["finetune.learning_rate"] * 100
        search.on_trial_complete(f"ray-{turn}", {METRIC: score} if scores else {"failed": "nan"})
        epoch = Epoch(1, 1, score, 0.0, 1.0, 1.0, 1.0, 1.0)
        found.append(
            Trial(trial_id(given["number"]), given["values"], 0, "finished", epochs=(epoch,))
        )
    return found


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_sampling_is_by_seed_and_conditional(folder: Path, search: str) -> None:
    text = SPACE.replace("trials: 6", f"trials: 24\nsearch: {search}")
    first, again = sampled(space_of(folder, text)), sampled(space_of(folder, text))
    assert first == again
    assert [trial.number for trial in first] == list(range(24))
    assert sampled(space_of(folder, text + "seed: 1\n")) != first
    strategies = {trial.values["pretrain.mask.strategy"] for trial in first}
    assert strategies == {"single", "last-biased", "recency", "multi"}
    for trial in first:
        values = trial.values
        strategy = values["pretrain.mask.strategy"]
        assert 3e-4 <= float(values["finetune.learning_rate"]) <= 5e-3  # type: ignore[arg-type]
        assert ("pretrain.mask.p" in values) == (strategy in ("last-biased", "recency"))
        assert ("pretrain.mask.k" in values) == (strategy == "multi")
        if strategy == "recency":
            assert 0.05 <= float(values["pretrain.mask.p"]) <= 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_resumed_search_goes_on_as_an_unbroken_one(folder: Path, search: str) -> None:
    """Finished trials are known with their scores, one that was interrupted comes again under its
    own number and values."""
    space = space_of(folder, SPACE.replace("trials: 6", f"trials: 20\nsearch: {search}"))
    unbroken = sampled(space)
    cut = dataclasses.replace(unbroken[8], status="interrupted", epochs=())
    resumed = sampled(space, (*unbroken[:8], cut, *unbroken[9:12]))
    assert resumed[0].id == "t0008"
    assert resumed[0].values == unbroken[8].values
    assert [(trial.id, trial.values) for trial in resumed[1:]] == [
        (t.id, t.values) for t in unbroken[12:]
    ]


def test_what_the_searcher_is_told_moves_it(folder: Path) -> None:
    """The test above can fail: with other scores, or with failed trials, it draws other points once
    it has learned."""
    space = space_of(folder, SPACE.replace("trials: 6", "trials: 20"))
    good, bad = sampled(space), sampled(space, scores=False)
    assert [trial.values for trial in good[:6]] == [trial.values for trial in bad[:6]]
    assert [trial.values for trial in good] != [trial.values for trial in bad]


def test_a_trial_whose_record_is_gone_is_drawn_anew(folder: Path) -> None:
    space = space_of(folder)
    unbroken = sampled(space)
    resumed = sampled(space, (unbroken[0], unbroken[2]))
    assert [trial.id for trial in resumed] == ["t0001", "t0003", "t0004", "t0005"]


def test_a_failed_trial_counts_as_worse_than_all(folder: Path) -> None:
    import optuna
    from genrec_tuning.search import study_of

    space = space_of(folder)
    trials = sampled(space)
    failed = dataclasses.replace(
        trials[0], status="failed"
    )  # its epochs before the NaN had a good score
    study = study_of(
        space, Sweep("s", {}, (failed, *trials[1:])), optuna.storages.InMemoryStorage()
    )
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert study.trials[0].value is None
    assert study.best_trial.number != 0


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("[3.0e-4, 5.0e-3]", "[3.0e-4, 6.0e-3]", r"space\.finetune\.learning_rate\.loguniform"),
        ("batch_size: 32", "batch_size: 64", r"(recipe\.finetune|set\.finetune)\.batch_size"),
        ("trials: 6", "trials: 6\nseed: 3", "seed"),
        ("trials: 6", "trials: 6\nreduction: 4", "reduction"),
        ("      single: {}\n", "", r"pretrain\.mask\.strategy\.choice\.single"),
    ],
)
def test_a_changed_space_is_named_on_resume(
    folder: Path, before: str, after: str, key: str
) -> None:
    old, new = (
        space_of(folder).as_dict(),
        space_of(folder, SPACE.replace(before, after, 1)).as_dict(),
    )
    with pytest.raises(
        ValueError, match=rf"^space\.yaml: \S*{key} is .* begun with .* another --out"
    ):
        refuse_changes(old, new, "space.yaml")


def test_more_trials_and_other_resources_are_no_other_space(folder: Path) -> None:
    changed = SPACE.replace(
        "trials: 6", "trials: 9\nkeep: 1\nretries: 5\nresources_per_trial: {cpu: 2}"
    )
    refuse_changes(space_of(folder).as_dict(), space_of(folder, changed).as_dict(), "space.yaml")


def test_what_reads_a_sweep_needs_neither_ray_nor_optuna() -> None:
    names = (
        "record",
        "space",
        "trial",
        "watch",
        "mirror",
        "sweep",
        "finish",
        "results",
        "report",
        "table",
    )
    modules = ", ".join(f"genrec_tuning.{name}" for name in names)
    code = f"import sys; sys.modules.update(ray=None, optuna=None); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def shown(number: int) -> Any:
    """What ASHA sees of a trial of Ray's."""
    return SimpleNamespace(trial_id=f"ray-{number}", config={"job": {"id": trial_id(number)}})


def told(asha: Any, number: int, scores: list[float], planned: int = 4) -> str:
    """A trial reports its epochs one after another: the decision that ends them."""
    trial, best, decision = shown(number), 0.0, "CONTINUE"
    asha.on_trial_add(None, trial)
    for epoch, score in enumerate(scores, start=1):
        best = max(best, score)
        result = {"epoch": epoch, "best_NDCG@10": best, "planned_epochs": planned}
        decision = asha.on_trial_result(None, trial, result)
        if decision == "STOP":
            return f"STOP {epoch}"
    return decision


def tried(number: int, scores: list[float], status: Any = "finished") -> Trial:
    epochs = tuple(
        Epoch(n, n, score, 0.0, 1.0, 1.0, 1.0, 1.0) for n, score in enumerate(scores, start=1)
    )
    return Trial(trial_id(number), {}, 0, status, epochs=epochs, planned_epochs=4)


def test_asha_stops_who_is_behind_and_nobody_at_the_end(folder: Path) -> None:
    from genrec_tuning.search import Asha

    space = space_of(folder, SPACE.replace("trials: 6", "trials: 6\ngrace: 1\nreduction: 2"))
    asha = Asha(space, Sweep("s", {}), 4)
    assert told(asha, 0, [0.5, 0.5, 0.5, 0.5]) == "CONTINUE"
    assert told(asha, 1, [0.2, 0.9]) == "STOP 1"
    assert told(asha, 2, [0.6, 0.1, 0.1, 0.1]) == "CONTINUE", "its best so far counts"
    assert told(asha, 3, [0.1], planned=1) == "CONTINUE", "its last epoch ends it anyway"
    trial = shown(4)
    asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trial, {"failed": "nan"}) == "CONTINUE"
    asha.on_trial_complete(None, trial, {"failed": "nan"})


def test_a_resumed_asha_knows_who_was_there(folder: Path) -> None:
    from genrec_tuning.search import Asha

    space = space_of(folder, SPACE.replace("trials: 6", "trials: 6\ngrace: 1\nreduction: 2"))
    known = (
        tried(0, [0.5, 0.5, 0.5, 0.5]),
        tried(1, [0.9], "failed"),
        tried(2, [0.3, 0.3], "interrupted"),
    )
    asha = Asha(space, Sweep("s", {}, known), 4)
    assert told(asha, 3, [0.4]) == "STOP 1", "0.5 was there before it"
    assert told(asha, 4, [0.6]) == "CONTINUE", "a failed trial's 0.9 does not count"
    # It was let through then; what it says again of its first epochs changes nothing.
    assert told(asha, 2, [0.3, 0.3, 0.35]) == "CONTINUE"
