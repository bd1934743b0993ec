"""What a sweep leaves: its table, live and in Parquet, and the recipe of its best trial, which
`genrec train` takes as it is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import forked
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from genrec_tuning.export import COLUMNS, best_yaml, table_of
from genrec_tuning.live_table import SweepTable
from genrec_tuning.record import Sweep, Trial
from genrec_tuning.report.page import write_results
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
def sweep(tiny_data: Path, tmp_path: Path) -> Sweep:
    """Three trials over the tiny recipe; the second is the best."""
    recipe = f"data: {tiny_data}\nrun: unused\n{TINY_RECIPE}"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "space.yaml").write_text(SPACE_FILE, encoding="utf-8")
    space = json.loads(json.dumps(load_space(tmp_path / "space.yaml").as_dict()))
    values = {"finetune.learning_rate": 0.004, "pretrain.mask.strategy": "multi"}
    values |= {"pretrain.mask.k": 3}
    trials = (
        trial(0, [0.1, 0.2], values={"pretrain.mask.strategy": "single"}, seed=7),
        trial(1, [0.1, 0.3, 0.2], "stopped", values=values, seed=7),
        trial(2, [0.9], "interrupted", values=values, seed=7),
    )
    return Sweep("tiny", space, trials)


def test_every_trial_has_a_row_with_its_epochs() -> None:
    sweep = ordinary_sweep()
    table = table_of(sweep)
    assert table.schema.names == [
        *COLUMNS, "finetune.learning_rate", "pretrain.mask.strategy", "pretrain.mask.p", "pretrain.mask.k",
        "model.dropout",
    ]  # fmt: skip
    for row, one in zip(table.to_pylist(), sweep.trials, strict=True):
        assert (row["trial"], row["status"], row["epochs"]) == (one.id, one.status, len(one.epochs))
        best = (one.best.NDCG10, one.best.epoch, one.best.HR10) if one.best else (None,) * 3
        assert (row["NDCG@10"], row["best_epoch"], row["HR@10"]) == best
        assert row["seconds"] == (one.epochs[-1].seconds if one.epochs else None)
        for key in table.schema.names[len(COLUMNS) :]:
            assert row[key] == one.values.get(key)
    odd = Trial("t0000", {}, 0, "finished", epochs=(epoch(1, math.nan),))
    assert table_of(Sweep("s", SPACE, (odd,)))["NDCG@10"].to_pylist() == [None]
    assert table_of(Sweep("s", {})).num_rows == 0


def test_types_follow_the_values() -> None:
    values: list[dict[str, Any]] = [
        {"whole": 1, "number": 1, "truth": True, "text": "a", "mixed": 1, "seed": 5},
        {"whole": 2, "number": 0.5, "truth": False, "text": "b", "mixed": "one", "seed": 6},
        {},
    ]
    trials = tuple(trial(n, [0.1], values=v, seed=v.get("seed", 0)) for n, v in enumerate(values))
    space = {"space": {"never": {"uniform": [0, 1]}, "chosen": {"choice": ["a"]}}}
    table = table_of(Sweep("s", space, trials))
    kinds = {name: table.schema.field(name).type for name in table.schema.names[len(COLUMNS) :]}
    assert kinds == {
        "never": pa.float64(), "chosen": pa.string(), "whole": pa.int64(), "number": pa.float64(), "truth": pa.bool_(),
        "text": pa.string(), "mixed": pa.string(),
    }  # fmt: skip
    assert table["mixed"].to_pylist() == ["1", "one", None]
    assert table["seed"].to_pylist() == [5, 6, 0]  # a key of the name of a column is that column


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=3), st.none()
)), max_size=5))  # fmt: skip
@settings(deadline=None)
def test_any_values_come_back_or_as_text(drawn: list[dict[str, Any]]) -> None:
    sweep = Sweep("s", {}, tuple(trial(n, [0.1], values=values) for n, values in enumerate(drawn)))
    buffer = io.BytesIO()
    pq.write_table(table_of(sweep), buffer)
    for values, row in zip(drawn, pq.read_table(buffer).to_pylist(), strict=True):
        for key, value in values.items():
            assert row[key] == value or (isinstance(row[key], str) and value is not None)


def test_the_best_recipe_is_whole_and_says_whose_it_is(sweep: Sweep, tmp_path: Path) -> None:
    named = dataclasses.replace(sweep, name="tiny\nseed: 99")  # stays a comment
    (tmp_path / "best.yaml").write_text(best_yaml(named))
    first = (tmp_path / "best.yaml").read_text().splitlines()[0]
    assert first == "# t0001 of the sweep tiny seed: 99: validation NDCG@10 0.3000 at epoch 2 of 9"
    recipe = load_recipe(tmp_path / "best.yaml")
    mask = recipe.pretrain.mask
    assert (recipe.finetune.learning_rate, mask.strategy, mask.k) == (0.004, "multi", 3)
    assert (recipe.seed, recipe.model.d_model) == (7, 16)
    with pytest.raises(ValueError, match="tiny: no trial has come to its end with a score"):
        best_yaml(dataclasses.replace(sweep, trials=(trial(0, [], "failed"),)))


def test_write_results_writes_to_any_address(sweep: Sweep, tmp_path: Path) -> None:
    for address in (str(tmp_path / "out"), f"memory:/{tmp_path}/out"):
        files, path = fsspec.core.url_to_fs(address)
        failed = dataclasses.replace(sweep, trials=(trial(0, [], "failed"),))
        for some, names in (
            (failed, ["report.html", "sweep.parquet"]),
            (sweep, ["best.yaml", "report.html", "sweep.parquet"]),
        ):
            write_results(some, address)
            assert sorted(Path(name).name for name in files.ls(path, detail=False)) == names
        with files.open(f"{path}/sweep.parquet") as file:
            assert pq.read_table(file).equals(table_of(sweep))


def test_train_takes_the_best_recipe_as_it_is(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best.yaml").write_text(best_yaml(sweep))
    monkeypatch.chdir(tmp_path)
    command = ["-m", "genrec_dist.cli", "train", tmp_path / "best.yaml"]
    done = forked.run(command, environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "tiny-best"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert load_recipe(run / "recipe.yaml") == load_recipe(tmp_path / "best.yaml")


# The live table


def shown(*sweeps: Sweep, terminal: bool = False, height: int = 30, width: int = 130) -> str:
    file = io.StringIO()
    terminals = {"force_terminal": terminal, "color_system": None}
    with SweepTable(Console(file=file, width=width, height=height, **terminals)) as table:  # type: ignore[arg-type]
        for sweep in sweeps:
            table.show(sweep)
    return file.getvalue()


def test_off_a_terminal_each_epoch_is_one_line() -> None:
    started = trial(0, [], "running", values={"finetune.learning_rate": 3e-4})
    stopped = trial(0, [0.0123, 0.02], "stopped", reason="behind others\nat epoch 2", attempts=2)
    trials = (started, started, started.with_epoch(epoch(1, 0.0123)), stopped)
    lines = shown(*(Sweep("s", SPACE, (one,)) for one in trials)).splitlines()
    assert lines == [
        "t0000  running      epoch 0/9  finetune.learning_rate 3e-4",
        "t0000  running      epoch 1/9  NDCG@10 0.0123  HR@10 0.0209  loss 4.000  21,001 tokens/s",
        "t0000  stopped      epoch 2/9  NDCG@10 0.0200  HR@10 0.0340  loss 4.600  21,002 tokens/s  "
        "attempt 2  behind others at epoch 2",
    ]
    # What ended under an earlier driver is not new.
    resumed = Sweep("s", SPACE, (trial(0, [0.1]), trial(1, [0.1], "running")), resumed=1)
    assert [text.split()[0] for text in shown(resumed).splitlines()] == ["t0001"]


def test_markup_in_a_value_is_text() -> None:
    running = trial(0, [], "running", values={"a": "[red]x[/red]"})
    assert "[red]x[/red]" in shown(Sweep("s", SPACE, (running,)))
    one = trial(0, [0.1], "failed", values={"[i]a": "[bold]x"}, reason="[/no] such tag")
    text = shown(Sweep("[b]s", {}, (one,)), terminal=True)
    for words in ("[b]s: 1 trials", "[i]a", "[bold]x", "t0000: [/no] such tag"):
        assert words in text


def test_in_a_terminal_the_table_shows_running_ones_first_and_the_best_next() -> None:
    sweep = ordinary_sweep(12)
    trials = (*sweep.trials, trial(12, [0.001], "running"))
    sweep = dataclasses.replace(sweep, started=0.0, trials=trials)
    text = shown(sweep, terminal=True)
    rows = re.findall(r"^(t\d{4}) ", text[: text.index("\x1b[?25h")].split("\x1b[2K")[0], re.M)
    best = sweep.best
    assert best is not None
    assert best.best is not None
    assert rows[:2] == ["t0012", best.id]
    assert len(rows) == 13
    assert f"best .{f'{best.best.NDCG10:.4f}'[2:]} ({best.id})" in text
    assert "13/24 trials, 1 running" in text
    long = shown(ordinary_sweep(60), terminal=True, height=20).split("\x1b[2K")[0]
    assert len(long.splitlines()) <= 20
    assert "and 47 more" in long


def test_in_a_narrow_terminal_whole_columns_are_left_out() -> None:
    names = ["trial", "status", "learning_rate", "strategy", "p", "k", "epoch", "NDCG@10", "best"]
    for width, titles in (
        (130, [*names, "loss", "tokens/s", "time"]),
        (80, names),
        (60, [*names[:3], *names[6:]]),
        (40, [*names[:2], *names[6:]]),
    ):
        text = shown(ordinary_sweep(6), terminal=True, width=width)
        text = text.removeprefix("\x1b[?25l").split("\x1b[2K")[0]
        lines = text.splitlines()
        assert next(line for line in lines if line.startswith("trial")).split() == titles, width
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines if re.match(r"t\d{4}  ", line))


# What docs/tuning.md says

DOCS = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")


def test_the_documented_space_is_one(tiny_data: Path, tmp_path: Path) -> None:
    text = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)[0]
    text = text.replace("/shared/data/beauty", str(tiny_data))
    (tmp_path / "space.yaml").write_text(text, encoding="utf-8")
    space = load_space(tmp_path / "space.yaml")
    assert (space.trials, space.reduction, len(space.space)) == (16, 3, 3)
    # Every key that a space file may have is in it.
    assert set(yaml.safe_load(text)) == set(space.as_dict()) - {"name", "recipe"}


def test_the_documented_commands_are_ours_and_every_option_is_named() -> None:
    command = typer.main.get_command(app).commands["tune"]  # type: ignore[attr-defined]
    documented = re.findall(r"^ +.*?genrec tune (.*?)(?: +#.*)?$", DOCS, re.M)
    assert len(documented) == 4
    for words in documented:
        command.make_context("tune", shlex.split(words))
    options = [p.opts[0] for p in command.params if p.param_type_name != "argument"]
    assert [option for option in options if f"| `{option}" not in DOCS] == []
    assert [column for column in COLUMNS if f"`{column}`" not in DOCS] == []
