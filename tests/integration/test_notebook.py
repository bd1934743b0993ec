"""The notebook runs from its first cell to its last: small on a generated log, and as it is on
MovieLens-100k."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from films import write_films
from nbclient import NotebookClient
from places import ROOT
from two_ranks import environment

NOTEBOOK = ROOT / "examples" / "movielens.ipynb"


def run_notebook(
    folder: Path, parameters: str, monkeypatch: pytest.MonkeyPatch, timeout: int
) -> str:
    """Run it with other parameters, as from the user's own paths; returns what it printed."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = [
        place
        for place, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(places) == 1
    notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(parameters))
    NotebookClient(
        notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    said = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join(said)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs"), cell.source[:80]
        assert cell.get("execution_count") is None


@pytest.mark.ranks
def test_the_notebook_runs_on_another_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_films(tmp_path)
    settings = ["finetune.epochs=1", "model.d_model=16", "model.ffn=32"]
    said = run_notebook(
        tmp_path,
        f'LOG, ITEMS, WORK = Path("log.csv"), Path("films.csv"), Path("work")\n'
        f"READ, SETTINGS = {{}}, {settings!r}",
        monkeypatch,
        timeout=240,
    )
    for words in (
        "200 users",
        "random codes",
        "GenRec",
        "A film called",
        "rated next",
        "report.html",
    ):
        assert words.lower() in said.lower(), words


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("GENREC_DATA" not in os.environ, reason="GENREC_DATA names no data")
def test_the_notebook_runs_on_movielens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ["GENREC_DATA"])
    said = run_notebook(
        tmp_path,
        f'LOG, ITEMS = Path("{data}/ml-100k.interactions.csv.gz"), Path("{data}/ml-100k.items.csv.gz")\n'
        "READ = {}",
        monkeypatch,
        timeout=3000,
    )
    assert "943 users, 1,349 films" in said
    assert said.count("co-occurrence") + said.count("knn") >= 1
    assert "rated next: " in said
