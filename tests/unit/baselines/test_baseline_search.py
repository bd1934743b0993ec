"""The search of baselines' settings: its draws, its moves, and the script that goes on where it
stopped and looks at test once."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from baseline_search import KNN, SASREC, Choice, Range, Search, best
from places import ROOT

from genrec_dist.baselines.sasrec_model import SasrecSettings
from genrec_dist.baselines.sasrec_run import sasrec_settings
from genrec_dist.data.item_graph import KnnSettings, knn_settings

SCRIPT = ROOT / "benchmarks" / "tune_baselines.py"


def test_a_range_and_a_choice_reach_from_end_to_end() -> None:
    assert [Range(0.5, 2.0).at(share) for share in (0, 0.5, 1)] == [0.5, 1.25, 2.0]
    assert [Range(0.01, 1.0, log=True).at(share) for share in (0, 0.5, 1)] == [0.01, 0.1, 1.0]
    assert [Choice((1, 2, 4)).at(share) for share in (0, 0.34, 0.99, 1)] == [1, 2, 4, 4]


@pytest.mark.parametrize(("of", "settings"), [(KNN, KnnSettings), (SASREC, SasrecSettings)])
def test_draws_are_settings_of_the_space_and_the_same_on_every_machine(
    of: Search, settings: type
) -> None:
    draws = [of.settings(number, 0, []) for number in range(len(of.moves), len(of.moves) + 50)]
    assert {*of.space} <= {field.name for field in fields(settings)}
    for draw in draws:
        words = [f"{key}={value}" for key, value in draw.items()]
        made = knn_settings(words) if settings is KnnSettings else sasrec_settings({}, words)
        assert {key: getattr(made, key) for key in draw} == draw
    for key, domain in of.space.items():
        found = {draw[key] for draw in draws}
        if isinstance(domain, Choice):
            assert found == set(domain.values)
        else:
            assert min(found) < domain.at(0.2) < domain.at(0.8) < max(found)
    assert (
        draws[3] == of.settings(len(of.moves) + 3, 0, []) != of.settings(len(of.moves) + 3, 1, [])
    )


def test_a_draw_is_what_was_published() -> None:
    assert KNN.settings(5, 0, []) == {
        **{"window": 6, "backward": 0.4595, "decay": 0.4105, "recent": 2},
        **{"smoothing": 0.2819, "out_power": 0.2261, "in_power": 0.04938},
    }


def test_moves_start_from_the_best_so_far() -> None:
    of = Search(space={"a": Choice((1, 2))}, moves=({}, {"a": 2}, {"b": 3}, {"a": 1}))
    rows = [
        {"number": 0, "settings": {}, "score": 0.1},
        {"number": 1, "settings": {"a": 2}, "score": 0.3},
        {"number": 2, "settings": {"a": 2, "b": 3}, "score": None},
        {"number": 3, "settings": {"a": 9}, "score": 0.9},
    ]
    assert of.settings(0, 0, []) == {}
    assert of.settings(2, 0, rows) == {"a": 2, "b": 3}
    assert of.settings(3, 0, rows) == {"a": 1}
    assert best([*rows, {"number": 4, "settings": {}, "score": 0.9}]) == rows[3]
    assert best(rows[2:3]) is None


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_baselines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tune_baselines", module)
    spec.loader.exec_module(module)
    return module


def run_script(script: ModuleType, data: Path, tmp_path: Path, *words: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        where = ["--json", str(tmp_path / "rows.json"), "--runs", str(tmp_path / "runs")]
        patch.setattr(sys, "argv", ["tune_baselines.py", str(data), *where, *words])
        script.main()
    return json.loads((tmp_path / "rows.json").read_text())["searches"]


def test_a_search_goes_on_where_it_stopped_and_the_winner_alone_is_tested(
    script: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    first = run_script(
        script, tiny_data, tmp_path, "--system", "knn", "--tries", "3", "--minutes", "0"
    )
    assert first["log knn"]["tries"] == []
    three = run_script(script, tiny_data, tmp_path, "--system", "knn", "--tries", "3")["log knn"]
    five = run_script(script, tiny_data, tmp_path, "--system", "knn", "--tries", "5")["log knn"]
    assert five["tries"][:3] == three["tries"]
    assert [row["settings"] for row in five["tries"]] == [
        {},
        *(KNN.settings(n, 0, []) for n in range(1, 5)),
    ]
    winner = max(five["tries"], key=lambda row: row["score"])
    assert five["winner"]["number"] == winner["number"]
    (scores,) = five["winner"]["all_users"]
    assert scores["validation"] == winner["validation"]
    run = tmp_path / "runs" / f"log-knn-t{winner['number']:03}"
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert scores["test"] == {name: metrics[name] for name in scores["test"]}
    assert {key: metrics["recipe"][key] for key in winner["settings"]} == winner["settings"]
    with pytest.raises(SystemExit, match="was searched with another seed"):
        run_script(script, tiny_data, tmp_path, "--system", "knn", "--seed", "1")


def test_a_search_of_trainings_keeps_its_curves_and_failures(
    script: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"d_model": 16, "max_length": 12, "validation_users": 40}
    moves = ({**small, "epochs": 3}, {"learning_rate": 1e30}, {"epochs": 1}, {"epochs": 5})
    monkeypatch.setattr(script, "SASREC", Search(SASREC.space, moves))
    monkeypatch.setattr(script, "HOPELESS_AT", 2)
    monkeypatch.setattr(script, "HOPELESS_BELOW", 1e9)
    found = run_script(script, tiny_data, tmp_path, "--system", "sasrec", "--tries", "4")[
        "log sasrec"
    ]
    rows = found["tries"]
    assert len(rows[0]["curve"]) == 3
    assert (
        rows[0]["score"]
        == max(epoch[-1] for epoch in rows[0]["curve"])
        == rows[0]["validation"]["NDCG@10"]
    )
    assert rows[1]["score"] is None
    assert "lower learning_rate" in rows[1]["ended"]
    assert (rows[2]["settings"], rows[2]["ended"]) == ({**small, "epochs": 1}, "finished")
    assert rows[3]["ended"].startswith("ended after 2 epochs: below")
    assert len(rows[3]["curve"]) == 2
    done = run_script(
        script, tiny_data, tmp_path, "--system", "sasrec", "--finish", "--seeds", "0,1"
    )["log sasrec"]
    assert [row["seed"] for row in done["winner"]["all_users"]] == [0, 1]
    assert (
        done["winner"]["settings"]
        == max((row for row in rows if row["score"]), key=lambda row: row["score"])["settings"]
    )
    assert done["tries"] == rows
