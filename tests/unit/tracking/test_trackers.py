"""Trackers for real: MLflow's local store, W&B's offline mode; and what fails."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from run_events import events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.tracking import trackers as module
from genrec_dist.tracking.trackers import IDS, Trackers, plain


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine MLflow makes its first database for a minute."""
    monkeypatch.setattr(module, "LONGEST_WAIT", 300)


def train(recipe: Path, *more: str) -> int:
    return run_command(["train", str(recipe), *more])


@pytest.mark.ranks  # the database, two trainings and an evaluation
def test_mlflow_gets_steps_recipe_results_and_report_and_a_resume_goes_on(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's local store needs sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where its artifacts go
    run = tiny_recipe.parent / "run"
    trackers = ["--set", "tracker=[mlflow, tensorboard]", "--set", "workers=1"]
    assert train(tiny_recipe, *trackers) == 0
    (found,) = mlflow.search_runs(experiment_names=["genrec"], output_format="list")
    assert json.loads((run / IDS).read_text()) == {"mlflow": found.info.run_id}
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    recipe = plain(load_recipe(run / "recipe.yaml").as_dict())
    assert found.data.params == {key: str(value) for key, value in recipe.items()}
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(found.info.run_id, "step/loss")
    steps = events(run, "step")
    assert [(m.step, m.value) for m in losses] == [(e["step"], e["loss"]) for e in steps]
    (validation,) = events(run, "validation")
    assert found.data.metrics["validation/NDCG_at_10"] == validation["NDCG@10"]
    assert "judgement/NDCG_at_10 of popularity" in found.data.metrics
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["report.html"]
    assert any((run / "tensorboard").iterdir())

    assert train(tiny_recipe, *trackers, "--resume", "latest") == 0
    assert run_command(["evaluate", str(run)]) == 0
    (found,) = mlflow.search_runs(experiment_names=["genrec"], output_format="list")
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert found.data.metrics["test/NDCG_at_10"] == metrics["NDCG@10"]
    assert found.data.metrics["test/HR_at_10 of knn"] == metrics["beside"]["knn"]["HR@10"]
    files = [file.path for file in client.list_artifacts(found.info.run_id)]
    assert sorted(files) == ["report.html", "test-results.json"]


def test_wandb_offline_gets_the_run_and_a_resume_goes_on(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tiny_recipe.parent / "run"
    for more in ([], ["--resume", "latest"]):
        assert train(tiny_recipe, "--set", "tracker=wandb", *more) == 0
    ids = json.loads((run / IDS).read_text())
    held = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in held] == [f"run-{ids['wandb']}.wandb"] * 2
    records = b"".join(path.read_bytes() for path in held)
    for part in (
        b"step/loss",
        b"validation/NDCG@10",
        b"judgement/NDCG@10 of knn",
        b"model.d_model",
    ):
        assert part in records, part
    assert re.search(rb"report\.html", records)
    assert not (run / "tensorboard").exists()


class Raising:
    """A tracker like one of Accelerate's, whose library fails in one of its methods."""

    def __init__(self, *names: str, **options: Any):
        self.main_process_only, self.calls, self.name = True, [], "x"
        self.tracker = self

    fails_in = ""
    made: list[Raising]

    def _call(self, method: str, *values: Any) -> None:
        self.calls.append((method, values))
        if method == self.fails_in:
            raise SystemExit("the server\nis gone") if method == "start" else OSError("no room")

    def start(self) -> None:
        Raising.made.append(self)
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("store", values)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._call("log", values, step)

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("method", ["start", "store", "log", "finish"])
def test_a_tracker_that_fails_warns_once_and_costs_the_run_nothing(
    method: str,
    tiny_recipe: Path,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    Raising.made, Raising.fails_in = [], method
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Raising)
    monkeypatch.setattr("genrec_dist.config.paths.find_spec", lambda name: name)
    assert train(tiny_recipe, "--set", "tracker=trackio") == 0
    said = "\n".join(capfd.readouterr())
    reason = "the server" if method == "start" else "no room"
    assert said.count(f"tracker trackio: {reason}: the run goes on without it") == 1
    assert "is gone" not in said
    (made,) = Raising.made
    assert [call[0] for call in made.calls].count(method) == 1
    run = tiny_recipe.parent / "run"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    steps, undisturbed = events(run, "step"), events(tiny_run, "step")
    for key in ("samples_digest", "loss"):
        assert [step[key] for step in steps] == [step[key] for step in undisturbed]


def test_a_tracker_that_hangs_is_waited_for_at_the_end_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    released = threading.Event()

    class Hanging(Raising):
        def log(self, values: dict[str, float], step: int | None = None) -> None:
            released.wait(60)

    Raising.made, Raising.fails_in = [], ""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Hanging)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.2)
    warned: list[str] = []
    trackers = Trackers(["trackio"], tmp_path, {"a": {"b": (1, 2)}, "c": None}, warned.append)
    start = time.perf_counter()
    for step in range(1000):
        trackers.log("step", {"step": step, "loss": 1.0})
    assert time.perf_counter() - start < 1
    trackers.finish(None)
    assert warned == ["trackers (trackio): not done after 0 s"]
    released.set()
    assert Raising.made[0].calls[1] == ("store", ({"a.b": "[1, 2]", "c": None},))


def test_tensorboard_is_the_default_and_none_is_none(
    tiny_recipe: Path, tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert load_recipe(tiny_recipe).tracker == ("tensorboard",)
    board = EventAccumulator(str(tiny_run / "tensorboard")).Reload()
    assert "step/loss" in board.Tags()["tensors"] + board.Tags()["scalars"]
    several = load_recipe(tiny_recipe, ["tracker=[wandb, mlflow]"])
    assert several.tracker == ("wandb", "mlflow")
    path = tiny_recipe.parent / "again.yaml"
    path.write_text(dump_recipe(several), encoding="utf-8")
    assert load_recipe(path) == several
    for value, part in (
        ("[none, mlflow]", "none stands alone"),
        ("tensorbord", "tensorboard"),
        ("trackio", "pip install trackio"),
    ):
        assert train(tiny_recipe, "--set", f"tracker={value}") == 1
        assert part in capfd.readouterr().err
    assert train(tiny_recipe, "--set", "tracker=none") == 0
    run = tiny_recipe.parent / "run"
    assert not (run / "tensorboard").exists()
    assert not (run / IDS).exists()
