"""Every example of docs/python.md runs, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from films import write_films
from places import ROOT

PAGE = ROOT / "docs" / "python.md"


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    assert len(blocks) >= 9
    write_films(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    for words in ("A film called", "kNN on the same users", "parameters", "--resume latest"):
        assert words in said, words
