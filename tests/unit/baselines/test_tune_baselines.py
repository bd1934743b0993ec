"""The script that tunes baselines: its draws, and that it continues and looks at test once."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tune_baselines
from tune_baselines import SPACES, best, draw

from genrec_dist.baselines.sasrec.model import SasrecSettings
from genrec_dist.baselines.sasrec.run import sasrec_settings
from genrec_dist.data.item_graph import KnnSettings, knn_settings


@pytest.mark.parametrize(("system", "settings"), [("knn", KnnSettings), ("sasrec", SasrecSettings)])
def test_draws_are_settings_all_over_the_space(system: str, settings: type) -> None:
    space = SPACES[system]
    draws = [draw(space, number, 0) for number in range(1, 61)]
    assert {*space} <= {field.name for field in fields(settings)}
    for drawn in draws:
        words = [f"{key}={value}" for key, value in drawn.items()]
        made = knn_settings(words) if system == "knn" else sasrec_settings({}, words)
        assert {key: getattr(made, key) for key in drawn} == drawn
    for key, (kind, values) in space.items():
        found = {drawn[key] for drawn in draws}
        low, high = values[0], values[-1]
        if kind == "choice":
            assert found == set(values)
            continue
        assert low <= min(found) < max(found) <= high
        middle = (low + high) / 2 if kind == "uniform" else (low * high) ** 0.5
        assert 15 < sum(value < middle for value in found) < 45
    assert draw(space, 0, 0) == {}
    assert draw(space, 4, 0) != draw(space, 4, 1)


def test_draw_is_the_same_on_every_machine() -> None:
    assert draw(SPACES["knn"], 5, 0) == {
        "window": 6,
        "backward": 0.4595,
        "decay": 0.4105,
        "recent": 2,
        "smoothing": 0.2819,
        "out_power": 0.2261,
        "in_power": 0.04938,
    }


def test_best_try_has_the_highest_score_and_is_the_first_of_equals() -> None:
    rows = [{"number": n, "score": score} for n, score in enumerate([0.1, None, 0.3, 0.3])]
    assert best(rows)["number"] == 2
    with pytest.raises(SystemExit, match="no try has ended well"):
        best(rows[1:2])


def tune(data: Path, folder: Path, system: str, *words: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        where = ["--json", str(folder / "rows.json"), "--runs", str(folder / "runs")]
        command = ["tune_baselines.py", str(data), "--system", system, *where, *words]
        patch.setattr("sys.argv", command)
        tune_baselines.main()
    return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def test_search_continues_where_it_stopped_and_the_best_alone_is_tested(
    tiny_data: Path, tmp_path: Path
) -> None:
    two = tune(tiny_data, tmp_path, "knn", "--tries", "2")["tries"]
    three = tune(tiny_data, tmp_path, "knn", "--tries", "3")["tries"]
    assert three[:2] == two
    space = SPACES["knn"]
    assert [row["settings"] for row in three] == [{}, draw(space, 1, 0), draw(space, 2, 0)]
    winner = max(three, key=lambda row: row["score"])
    done = tune(tiny_data, tmp_path, "knn", "--finish")
    assert done["tries"] == three
    assert done["winner"]["number"] == winner["number"]
    tested = sorted(path.parent.name for path in tmp_path.glob("runs/*/metrics-test.json"))
    assert tested == [f"{tiny_data.name}-knn-t{winner['number']:03}"]
    metrics = json.loads((tmp_path / "runs" / tested[0] / "metrics-test.json").read_text())
    scores = done["winner"]["test"]["0"]
    assert scores == {name: metrics[name] for name in scores}
    assert {key: metrics["recipe"][key] for key in winner["settings"]} == winner["settings"]
    with pytest.raises(SystemExit, match="holds another search"):
        tune(tiny_data, tmp_path, "knn", "--seed", "1")


def test_failed_training_is_a_row_and_each_seed_is_tested(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"d_model": 16, "max_length": 12, "validation_users": 40, "epochs": 1}
    drawn = [small, {**small, "learning_rate": 1e30, "epochs": 3}]
    monkeypatch.setattr(tune_baselines, "draw", lambda space, number, seed: drawn[number])
    rows = tune(tiny_data, tmp_path, "sasrec", "--tries", "2")["tries"]
    assert rows[0]["score"] == rows[0]["validation"]["NDCG@10"] > 0
    assert (rows[0]["ended"], rows[1]["score"]) == ("finished", None)
    assert "lower learning_rate" in rows[1]["ended"]
    done = tune(tiny_data, tmp_path, "sasrec", "--finish", "--seeds", "0,1")
    assert list(done["winner"]["test"]) == ["0", "1"]
    assert done["winner"]["settings"] == small
    runs = sorted(path.parent.name for path in tmp_path.glob("runs/*/metrics-test.json"))
    assert runs == [f"{tiny_data.name}-sasrec-t000", f"{tiny_data.name}-sasrec-t000-seed1"]
