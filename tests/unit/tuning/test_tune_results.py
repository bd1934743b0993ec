"""What a sweep leaves: its table, live and in Parquet, and the recipe of its best trial, which
`genrec train` takes as it is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from genrec_tuning.export import (
    COLUMNS,
    table_of,
    write_best_yaml,
    write_results,
    write_sweep_parquet,
)
from genrec_tuning.live_table import SweepTable, line
from genrec_tuning.record import Sweep, Trial, best_trial
from genrec_tuning.space import load_space
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sweeps import SPACE, epoch, ordinary_sweep, trial
from places import ROOT
from rich.console import Console
from tiny import TINY_RECIPE
from two_ranks import environment

from genrec_dist.cli.app import app
from genrec_dist.config.load import load_recipe

SPACE_FILE = """
base: recipe.yaml
set: {seed: 7}
trials: 3
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
  pretrain.mask.strategy:
    choice:
      single: {}
      multi: {pretrain.mask.k: {int: [2, 3]}}
"""


@pytest.fixture
def real_space(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A space as a sweep's record holds it, over the tiny recipe."""
    (tmp_path / "recipe.yaml").write_text(
        f"data: {tiny_data}\nrun: unused\n{TINY_RECIPE}", encoding="utf-8"
    )
    (tmp_path / "space.yaml").write_text(SPACE_FILE, encoding="utf-8")
    found: dict[str, Any] = json.loads(json.dumps(load_space(tmp_path / "space.yaml").as_dict()))
    return found


def real_sweep(space: dict[str, Any]) -> Sweep:
    values = {
        "finetune.learning_rate": 0.004,
        "pretrain.mask.strategy": "multi",
        "pretrain.mask.k": 3,
    }
    trials = (
        trial(
            0,
            [0.1, 0.2],
            values={"finetune.learning_rate": 0.001, "pretrain.mask.strategy": "single"},
            seed=7,
        ),
        trial(1, [0.1, 0.3, 0.2], "stopped", values=values, seed=7),
        trial(2, [0.9], "interrupted", values=values, seed=7),
    )
    return Sweep("tiny", space, trials)


# Which trial is the best


def test_the_best_trial_has_the_highest_score_of_those_that_ended() -> None:
    sweep = Sweep("s", SPACE, (
        trial(0, [0.1]), trial(1, [0.3, 0.2], "stopped"), trial(2, [0.3]),
        trial(3, [0.9], "running"), trial(4, [0.9], "failed"), trial(5, [0.9], "interrupted"),
    ))  # fmt: skip
    best = best_trial(sweep)
    assert best is not None
    assert best.id == "t0001"  # of equals the first
    assert best_trial(Sweep("s", SPACE, sweep.trials[3:])) is None
    assert best_trial(Sweep("s", SPACE)) is None


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    odd = Trial("t0000", {}, 0, "finished", epochs=(epoch(1, math.nan),))
    best = best_trial(Sweep("s", SPACE, (odd, trial(1, [0.01]))))
    assert best is not None
    assert best.id == "t0001"
    assert best_trial(Sweep("s", SPACE, (odd,))) is None
    assert table_of(Sweep("s", SPACE, (odd,)))["NDCG@10"].to_pylist() == [None]


# sweep.parquet


def test_every_trial_has_a_row_with_its_epochs(tmp_path: Path) -> None:
    sweep = ordinary_sweep()
    write_sweep_parquet(sweep, tmp_path / "sweep.parquet")
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table.schema.names[: len(COLUMNS)] == list(COLUMNS)
    assert table.schema.names[len(COLUMNS) :] == [
        "finetune.learning_rate", "pretrain.mask.strategy", "pretrain.mask.p", "pretrain.mask.k", "model.dropout",
    ]  # fmt: skip
    for row, one in zip(table.to_pylist(), sweep.trials, strict=True):
        assert (row["trial"], row["status"], row["epochs"]) == (one.id, one.status, len(one.epochs))
        assert (row["NDCG@10"], row["best_epoch"]) == (one.best_NDCG10, one.best_epoch)
        assert row["HR@10"] == (one.best.HR10 if one.best else None)
        assert row["seconds"] == (one.epochs[-1].seconds if one.epochs else None)
        for key in table.schema.names[len(COLUMNS) :]:
            assert row[key] == one.values.get(key)


def test_types_follow_the_values() -> None:
    values: list[dict[str, Any]] = [
        {"whole": 1, "number": 1, "truth": True, "text": "a", "mixed": 1, "seed": 5},
        {"whole": 2, "number": 0.5, "truth": False, "text": "b", "mixed": "one", "seed": 6},
        {},
    ]
    trials = tuple(trial(n, [0.1], values=v, seed=v.get("seed", 0)) for n, v in enumerate(values))
    table = table_of(
        Sweep("s", {"space": {"never": {"uniform": [0, 1]}, "chosen": {"choice": ["a"]}}}, trials)
    )
    kinds = {name: table.schema.field(name).type for name in table.schema.names[len(COLUMNS) :]}
    assert kinds == {
        "never": pa.float64(), "chosen": pa.string(), "whole": pa.int64(), "number": pa.float64(), "truth": pa.bool_(),
        "text": pa.string(), "mixed": pa.string(),
    }  # fmt: skip
    assert table["mixed"].to_pylist() == ["1", "one", None]
    assert table["seed"].to_pylist() == [5, 6, 0]  # a key of the name of a column is that column


def test_a_sweep_without_trials_has_an_empty_table(tmp_path: Path) -> None:
    write_sweep_parquet(Sweep("s", {}), tmp_path / "sweep.parquet")
    assert pq.read_table(tmp_path / "sweep.parquet").num_rows == 0


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=3), st.none()
)), max_size=5))  # fmt: skip
@settings(deadline=None)
def test_any_values_come_back_or_as_text(drawn: list[dict[str, Any]]) -> None:
    sweep = Sweep("s", {}, tuple(trial(n, [0.1], values=values) for n, values in enumerate(drawn)))
    buffer = io.BytesIO()
    pq.write_table(table_of(sweep), buffer)
    table = pq.read_table(buffer)
    for values, row in zip(drawn, table.to_pylist(), strict=True):
        for key, value in values.items():
            told = row[key]
            assert told == value or (isinstance(told, str) and value is not None)


# best.yaml


def test_the_best_recipe_is_whole_and_says_whose_it_is(
    real_space: dict[str, Any], tmp_path: Path
) -> None:
    write_best_yaml(real_sweep(real_space), tmp_path / "best.yaml")
    first = (tmp_path / "best.yaml").read_text().splitlines()[0]
    assert first == "# t0001 of the sweep tiny: validation NDCG@10 0.3000 at epoch 2 of 9"
    recipe = load_recipe(tmp_path / "best.yaml")
    assert (
        recipe.finetune.learning_rate,
        recipe.pretrain.mask.strategy,
        recipe.pretrain.mask.k,
    ) == (0.004, "multi", 3)
    assert (recipe.seed, recipe.run, recipe.model.d_model) == (7, "runs/tiny-best", 16)


def test_without_a_score_there_is_no_best_recipe(
    real_space: dict[str, Any], tmp_path: Path
) -> None:
    sweep = dataclasses.replace(real_sweep(real_space), trials=(trial(0, [], "failed"),))
    with pytest.raises(ValueError, match="tiny: no trial has come to its end with a score"):
        write_best_yaml(sweep, tmp_path / "best.yaml")
    write_results(sweep, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "sweep.parquet",
    ]


def test_a_name_over_several_lines_stays_a_comment(
    real_space: dict[str, Any], tmp_path: Path
) -> None:
    sweep = dataclasses.replace(real_sweep(real_space), name="a\nseed: 99")
    write_best_yaml(sweep, tmp_path / "best.yaml")
    assert load_recipe(tmp_path / "best.yaml").seed == 7


def test_train_takes_the_best_recipe_as_it_is(
    real_space: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(real_sweep(real_space), tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    command = ["-m", "genrec_dist.cli", "train", tmp_path / "sweep" / "best.yaml"]
    done = forked.run(command, environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "tiny-best"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert load_recipe(run / "recipe.yaml") == load_recipe(tmp_path / "sweep" / "best.yaml")


def test_results_lie_at_any_address(real_space: dict[str, Any]) -> None:
    write_results(real_sweep(real_space), "memory://sweeps/tiny")
    files = fsspec.filesystem("memory")
    names = sorted(name.rpartition("/")[2] for name in files.ls("/sweeps/tiny", detail=False))
    assert names == ["best.yaml", "report.html", "sweep.parquet"]
    with files.open("/sweeps/tiny/sweep.parquet") as file:
        assert pq.read_table(file).num_rows == 3


def test_the_page_and_the_table_need_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = sys.modules['optuna'] = None\n"
    code += "import genrec_tuning.live_table, genrec_tuning.report.page, genrec_tuning.record, genrec_tuning.export"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# The live table


def spoken(*sweeps: Sweep, terminal: bool = False, height: int = 30) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=130, height=height, color_system=None
    )
    with SweepTable(console) as table:
        for sweep in sweeps:
            table.show(sweep)
    return file.getvalue()


def test_off_a_terminal_each_epoch_is_one_line() -> None:
    started = trial(0, [], "running", values={"finetune.learning_rate": 3e-4})
    sweeps = [
        Sweep("s", SPACE, (one,))
        for one in (
            started,
            started,
            started.with_epoch(epoch(1, 0.0123)),
            trial(0, [0.0123, 0.02], "stopped", reason="behind others\nat epoch 2", attempts=2),
        )
    ]
    lines = spoken(*sweeps).splitlines()
    assert lines == [
        "t0000  running      epoch 0/9  finetune.learning_rate 3e-4",
        "t0000  running      epoch 1/9  NDCG@10 0.0123  HR@10 0.0209  loss 4.000  21,001 tokens/s",
        "t0000  stopped      epoch 2/9  NDCG@10 0.0200  HR@10 0.0340  loss 4.600  21,002 tokens/s  attempt 2  "
        "behind others at epoch 2",
    ]


def test_what_an_earlier_driver_finished_is_no_news() -> None:
    sweep = Sweep("s", SPACE, (trial(0, [0.1]), trial(1, [0.1], "running")), resumed=1)
    assert [text.split()[0] for text in spoken(sweep).splitlines()] == ["t0001"]


def test_markup_in_a_value_is_text() -> None:
    assert "[red]x[/red]" in spoken(
        Sweep("s", SPACE, (trial(0, [], "running", values={"a": "[red]x[/red]"}),))
    )
    one = trial(0, [0.1], "failed", values={"[i]a": "[bold]x"}, reason="[/no] such tag")
    text = spoken(Sweep("[b]s", {}, (one,)), terminal=True)
    assert all(
        words in text for words in ("[b]s: 1 trials", "[i]a", "[bold]x", "t0000: [/no] such tag")
    )


def test_in_a_terminal_the_table_shows_running_ones_first_and_the_best_next() -> None:
    sweep = ordinary_sweep(12)
    sweep = dataclasses.replace(
        sweep, started=0.0, trials=(*sweep.trials, trial(12, [0.001], "running"))
    )
    text = spoken(sweep, terminal=True)
    rows = re.findall(r"^(t\d{4}) ", text[: text.index("\x1b[?25h")].split("\x1b[2K")[0], re.M)
    best = best_trial(sweep)
    assert best is not None
    assert rows[:2] == ["t0012", best.id]
    assert len(rows) == 13
    assert f"best .{f'{best.best_NDCG10:.4f}'[2:]} ({best.id})" in text
    assert "13/24 trials, 1 running" in text


def test_a_long_sweep_fits_the_terminal() -> None:
    text = spoken(ordinary_sweep(60), terminal=True, height=20)
    drawn = text.split("\x1b[2K")[0]
    assert len(drawn.splitlines()) <= 20
    assert "and 47 more" in drawn


def test_a_trial_is_one_line_whatever_its_reason() -> None:
    assert "\n" not in line(trial(0, [], "failed", reason="Traceback\n  boom\n"))


# What docs/tuning.md says

DOCS = ROOT / "docs" / "tuning.md"


def test_the_documented_space_is_one(tiny_data: Path, tmp_path: Path) -> None:
    text = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)[0]
    (tmp_path / "space.yaml").write_text(
        text.replace("/shared/data/beauty", str(tiny_data)), encoding="utf-8"
    )
    space = load_space(tmp_path / "space.yaml")
    assert (space.trials, space.reduction, len(space.space)) == (16, 3, 3)
    # Every key that a space file may have is in it.
    written = set(yaml.safe_load(text))
    assert written == {field.name for field in dataclasses.fields(space)} - {
        "name",
        "recipe",
        "resources",
    } | {"resources_per_trial"}


def test_the_documented_commands_are_ours_and_every_option_is_named() -> None:
    text = DOCS.read_text(encoding="utf-8")
    command = typer.main.get_command(app).commands["tune"]  # type: ignore[attr-defined]
    told = re.findall(r"^ +.*?genrec tune (.*?)(?: +#.*)?$", text, re.M)
    assert len(told) == 4
    for words in told:
        command.make_context("tune", shlex.split(words))
    for parameter in command.params:
        assert parameter.param_type_name == "argument" or f"| `{parameter.opts[0]}" in text, (
            parameter.opts
        )
    for column in COLUMNS:
        assert f"`{column}`" in text, column
