"""docs/troubleshooting.md shows what is printed: some of its commands are run, and compared."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from places import ROOT
from tiny import TINY_RECIPE

from genrec_dist.cli.app import run_command

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PRINTED = dict(re.findall(r"^    \$ (genrec .+)\n    (genrec: .+)$", PAGE, flags=re.MULTILINE))
SET = "genrec train small.yaml --data data/mine --run runs/a --set"
CHECKED = [
    "genrec prepare lgo.csv --out data/mine",
    "genrec prepare https://example.com/log.csv --out data/mine",
    "genrec prepare headerless.csv --out data/mine",
    "genrec prepare two.zip --out data/mine",
    "genrec prepare titles.txt --out data/mine",
    "genrec prepare small.csv --out data/mine",
    "genrec prepair log.csv --out data/mine",
    "genrec shard data/nothere",
    "genrec shard log.csv",
    "genrec train tinny --data data/mine --run runs/a",
    "genrec train small.yaml --data data/mine",
    "genrec train small.yaml --data data/mnie --run runs/a",
    "genrec train bad_yaml.yaml --data data/mine --run runs/a",
    "genrec train small.yaml --data s3://bucket/data --run runs/a",
    f"{SET} finetune.epoch=2",
    f"{SET} finetune.epochs=two",
    f"{SET} model.d_model=1000000000",
    "genrec report log.csv",
    "genrec plan tiny --users 100 --items 50 --gpus 1000000000",
    "genrec plan tiny --users 100 --items 50 --memory nan",
    "genrec evaluate runs/none",
    "genrec serve runs/none",
    "genrec serve runs/a --host 0.0.0.0",
    "genrec evaluate runs/a --split tset",
    "genrec launch-file gpu_single_309",
]


def make_files(folder: Path) -> None:
    """The files that the commands name."""
    header = "user_id,item_id,timestamp\n"
    (folder / "log.csv").write_text(f"{header}u00,b36,1600064004\n")
    (folder / "headerless.csv").write_text("u00,b36,1600064004\n")
    rows = "u1,a,1600000000\nu1,b,1600000100\nu2,a,1600000000\n"
    (folder / "small.csv").write_text(header + rows)
    titles = "The Old Man and the Sea\nA Farewell to Arms\nFor Whom the Bell Tolls again\n"
    (folder / "titles.txt").write_text(titles)
    (folder / "small.yaml").write_text(TINY_RECIPE)
    (folder / "bad_yaml.yaml").write_text("model: {d_model: 16\nseed: 1\n")
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.write(folder / "log.csv", "log.csv")
        archive.write(folder / "small.csv", "small.csv")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", CHECKED)
def test_the_page_shows_what_a_mistake_prints(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_files(tmp_path)
    before = files_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENREC_TOKEN", raising=False)
    assert run_command(shlex.split(command)[1:]) in (1, 2)
    captured = capfd.readouterr()
    assert captured.err == PRINTED[command] + "\n"
    assert captured.out == ""
    assert files_of(tmp_path) == before


def test_data_without_shards_are_told_the_command_that_makes_them(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_files(tmp_path)
    shutil.copytree(tiny_data, tmp_path / "data" / "mine", ignore=shutil.ignore_patterns("shards"))
    monkeypatch.chdir(tmp_path)
    command = "genrec train small.yaml --data data/mine --run runs/a"
    assert run_command(shlex.split(command)[1:]) == 1
    said = capfd.readouterr().err
    assert f"    $ {command}\n    {said}" in PAGE
    assert run_command(shlex.split(said.split("`")[1])[1:]) == 0
    assert run_command(["train", "small.yaml", "--data", "data/mine", "--run", "runs/a"]) == 0
