"""`genrec backbone`: what it cannot read is one line, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec_dist.cli.app import run_command


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.gguf", "no such file: give a .gguf file, or smollm2"),
        ("broken.gguf", "not a GGUF file of a known model"),
    ],
)
def test_files_that_are_no_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    code = run_command(["backbone", str(tmp_path / source), "--out", str(tmp_path / "out")])
    assert code == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("genrec: ")]
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_an_existing_directory_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert run_command(["backbone", str(tmp_path / "a.gguf"), "--out", str(tmp_path)]) == 1
    assert "exists: give another --out" in capsys.readouterr().err
