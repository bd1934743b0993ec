"""The space of a sweep: refused in one line before anything starts, sampled by seed, conditional
keys only where they apply."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from genrec_tuning.record import Sweep, Trial, trial_id
from genrec_tuning.space import Space, load_space, planned_epochs, points, recipe_of, refuse_changes
from genrec_tuning.sweep import deadline, job_of
from made_sweeps import trial
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
    found = (space.search, space.scheduler, space.grace, space.reduction, space.keep)
    assert found == ("optuna", "asha", 2, 3, 3)
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
        ("trials: 6", "trials: [", r"space\.yaml:\d+: not YAML"),
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
        ("trials: 6", "resources_per_trial: {gpu: 1.5}", r"gpu 1.5: above 1 a trial takes whole GPUs"),
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
    text = (
        "base: base.yaml\nspace:\n  model.d_model: {choice: [16, 24]}\n  model.heads: {choice: "
        "[2, 16]}\n"
    )
    with pytest.raises(
        ValueError, match=r"model\.heads: 16 is refused|model\.d_model: 24 is refused"
    ):
        space_of(folder, text)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tuning" / "spaces").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_spaces_are_good(path: Path) -> None:
    assert load_space(path).trials >= 4


def sampled(space: Space, known: tuple[Trial, ...] = (), scores: bool = True) -> list[Trial]:
    """What the search gives one after another, each reported with a score made of its values."""
    from genrec_tuning.search import Search
    from genrec_tuning.trial import METRIC

    def config(number: int, values: dict[str, Any]) -> dict[str, Any]:
        return {"number": number, "values": values}

    search, found = Search(space, Sweep("s", space.as_dict(), known), config), []
    for turn in range(space.trials - sum(one.status == "finished" for one in known)):
        given = search.suggest(f"ray-{turn}")
        assert given is not None
        score = given["values"]["finetune.learning_rate"] * 100
        search.on_trial_complete(f"ray-{turn}", {METRIC: score} if scores else {"failed": "nan"})
        found.append(trial(given["number"], [score], values=given["values"]))
    return found


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_sampling_is_by_seed_and_conditional(folder: Path, search: str) -> None:
    text = SPACE.replace("trials: 6", f"trials: 24\nsearch: {search}")
    first, again = sampled(space_of(folder, text)), sampled(space_of(folder, text))
    assert first == again
    assert [one.number for one in first] == list(range(24))
    assert sampled(space_of(folder, text + "seed: 1\n")) != first
    strategies = {one.values["pretrain.mask.strategy"] for one in first}
    assert strategies == {"single", "last-biased", "recency", "multi"}
    for one in first:
        values: dict[str, Any] = one.values
        strategy = values["pretrain.mask.strategy"]
        assert 3e-4 <= values["finetune.learning_rate"] <= 5e-3
        assert ("pretrain.mask.p" in values) == (strategy in ("last-biased", "recency"))
        assert ("pretrain.mask.k" in values) == (strategy == "multi")
        if strategy == "recency":
            assert 0.05 <= values["pretrain.mask.p"] <= 0.5


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_resumed_search_goes_on_as_an_unbroken_one(folder: Path, search: str) -> None:
    """Finished trials are known with their scores, one that was interrupted comes again under its
    own number and values, and one whose record is gone is drawn anew."""
    space = space_of(folder, SPACE.replace("trials: 6", f"trials: 20\nsearch: {search}"))
    unbroken = sampled(space)
    cut = dataclasses.replace(unbroken[8], status="interrupted", epochs=())
    resumed = sampled(space, (*unbroken[:8], cut, *unbroken[9:12]))
    assert (resumed[0].id, resumed[0].values) == ("t0008", unbroken[8].values)
    assert [(one.id, one.values) for one in resumed[1:]] == [
        (one.id, one.values) for one in unbroken[12:]
    ]
    gone = sampled(space, (unbroken[0], *unbroken[2:18]))
    assert [one.id for one in gone] == ["t0001", "t0018", "t0019"]


def test_scores_move_the_search(folder: Path) -> None:
    """The test above can fail: with other scores, or with failed trials, other points are drawn
    once the search has learned."""
    space = space_of(folder, SPACE.replace("trials: 6", "trials: 20"))
    good, bad = sampled(space), sampled(space, scores=False)
    assert [one.values for one in good[:6]] == [one.values for one in bad[:6]]
    assert [one.values for one in good] != [one.values for one in bad]


def test_a_failed_trial_counts_as_worse_than_all(folder: Path) -> None:
    import optuna
    from genrec_tuning.search import study_of

    space = space_of(folder)
    first, *others = sampled(space)
    failed = dataclasses.replace(first, status="failed")  # with good scores before the NaN
    storage = optuna.storages.InMemoryStorage()
    study = study_of(space, Sweep("s", {}, (failed, *others)), storage)
    assert (study.trials[0].state, study.trials[0].value) == (optuna.trial.TrialState.PRUNED, None)
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
    more = "trials: 9\nkeep: 1\nretries: 5\nresources_per_trial: {cpu: 2}"
    changed = space_of(folder, SPACE.replace("trials: 6", more))
    refuse_changes(space_of(folder).as_dict(), changed.as_dict(), "space.yaml")


@pytest.mark.parametrize(
    ("number", "scores", "planned", "decision"),
    [
        (0, [0.5, 0.5, 0.5, 0.5], 4, "CONTINUE"),
        (1, [0.2, 0.9], 4, "STOP 1"),
        (2, [0.6, 0.1, 0.1, 0.1], 4, "CONTINUE"),  # its best so far counts
        (3, [0.1], 1, "CONTINUE"),  # its last epoch ends it anyway
        (4, [0.4], 4, "STOP 1"),  # 0.5 was there before it, in an earlier driver
        (5, [0.3, 0.3, 0.35], 4, "CONTINUE"),  # interrupted, it was let through then
        (7, [0.55], 4, "CONTINUE"),  # a failed trial's 0.9 does not count
    ],
)
def test_asha_stops_who_is_behind_before_and_after_a_resume(
    folder: Path, number: int, scores: list[float], planned: int, decision: str
) -> None:
    from genrec_tuning.search import Asha

    def shown(number: int) -> Any:
        config = {"job": {"id": trial_id(number)}}
        return SimpleNamespace(trial_id=f"ray-{number}", config=config)

    space = space_of(folder, SPACE.replace("trials: 6", "trials: 6\ngrace: 1\nreduction: 2"))
    known = (trial(6, [0.9], "failed"), trial(5, [0.3, 0.3], "interrupted"))
    first = trial(0, [0.5, 0.5, 0.5, 0.5])
    asha = Asha(space, Sweep("s", {}, (*known, first) if number else known), longest=4)
    one, best = shown(number), 0.0
    asha.on_trial_add(None, one)
    for epoch, score in enumerate(scores, start=1):
        best = max(best, score)
        result = {"epoch": epoch, "best_NDCG@10": best, "planned_epochs": planned}
        decided = asha.on_trial_result(None, one, result)
        if decided == "STOP":
            decided = f"STOP {epoch}"
            break
    assert decided == decision
    failed = shown(8)
    asha.on_trial_add(None, failed)
    assert asha.on_trial_result(None, failed, {"failed": "nan"}) == "CONTINUE"
    asha.on_trial_complete(None, failed, {"failed": "nan"})


def test_trial_states_follow_rays_callbacks(folder: Path) -> None:
    from genrec_tuning.ray_driver import TrialStates

    space, changed, ended, due = (
        space_of(folder).as_dict(),
        list[Trial](),
        list[int](),
        deadline(None),
    )
    job = job_of("t0003", "runs/t0003", {"finetune.learning_rate": 1e-3}, space, str(folder))
    (folder / "error").write_text("Failure # 1\nx\nFailure # 2\nTraceback\nOSError: no space\n")
    one = SimpleNamespace(config={"job": job}, error_file=str(folder / "error"))
    known = trial(3, [0.1], "running", attempts=1, reason="its driver was gone")
    states = TrialStates((known,), due, changed.append, lambda: ended.append(1))
    fresh = TrialStates((), due, changed.append)

    fresh.on_trial_start(0, [], one)
    last = changed[-1]
    assert (last.id, last.status, last.attempts, last.run) == ("t0003", "running", 1, "runs/t0003")
    assert (last.values, last.planned_epochs) == ({"finetune.learning_rate": 1e-3}, 4)
    states.on_trial_start(0, [], one)
    assert (changed[-1].status, changed[-1].attempts) == ("running", 2)
    states.on_trial_result(0, [], one, {**trial(0, [0.1, 0.2]).epochs[1].as_dict(), "more": 1})
    assert [epoch.epoch for epoch in changed[-1].epochs] == [1, 2]
    states.on_trial_recover(0, [], one)
    assert (changed[-1].status, changed[-1].reason) == ("running", "OSError: no space")
    assert not ended
    states.on_trial_complete(0, [], one)
    assert (changed[-1].status, changed[-1].reason) == ("stopped", "behind others at epoch 2")
    states.on_trial_start(0, [], one)
    due.stop.number = 15
    states.on_trial_complete(0, [], one)
    assert (changed[-1].status, changed[-1].reason) == ("running", None)  # left to a resume
    states.on_trial_result(0, [], one, {"failed": "NotFinite: nan"})
    assert (changed[-1].status, changed[-1].reason) == ("failed", "NotFinite: nan")
    (folder / "error").write_text("Failure # 1\nThe actor died\nmore\n")
    states.on_trial_error(0, [], one)
    assert (changed[-1].status, changed[-1].reason) == ("failed", "its process died")
    states.on_trial_result(0, [], one, {"finished": True})
    assert changed[-1].status == "finished"
    assert len(ended) == 3
    assert copy.copy(states).__class__.__name__ == "Callback"  # what Ray stores of it is empty


def test_a_sweep_of_an_earlier_version_goes_on(folder: Path) -> None:
    """Its recipe has the old names of keys, which name no change."""
    now = json.loads(json.dumps(space_of(folder).as_dict()))
    old = json.loads(json.dumps(now))
    old["recipe"]["begin_from"] = old["recipe"].pop("init_from")
    old["recipe"]["optimizer"]["clip"] = old["recipe"]["optimizer"].pop("max_grad_norm")
    refuse_changes(old, now, "space.yaml")
    old["recipe"]["optimizer"]["clip"] = 7.0
    with pytest.raises(ValueError, match=r"recipe\.optimizer\.max_grad_norm is"):
        refuse_changes(old, now, "space.yaml")
