"""The doctor: finds what is there, names the remedy for what is not, and imports nothing heavy for
a version."""

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from genrec_dist.cli import doctor
from genrec_dist.cli.doctor import Finding, as_json, examine, healthy, render


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.what: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine_is_fit() -> None:
    findings = examine()
    assert healthy(findings), [finding for finding in findings if finding.state == "broken"]
    named = by_name(findings)
    assert {
        "Python",
        "memory",
        "torch",
        "deepspeed",
        "ray",
        "GPU",
        "processes (gloo)",
        "writing here",
    } <= named.keys()
    assert metadata.version("torch") in named["torch"].detail
    for check in ("torch computes", "tar in a temporary directory", "writing here"):
        assert named[check].state == "ok"


def test_a_missing_required_package_is_broken_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("pyarrow", "deepspeed"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    named = by_name(examine())
    assert (named["pyarrow"].state, named["pyarrow"].remedy) == ("broken", "pip install pyarrow")
    assert (named["deepspeed"].state, named["deepspeed"].remedy) == (
        "absent",
        "pip install 'genrec-dist[zero]'",
    )
    assert not healthy(list(named.values()))
    assert healthy([finding for finding in named.values() if finding.what != "pyarrow"])


def test_another_version_than_the_tested_one_is_said(tmp_path: Path) -> None:
    found = metadata.version("pyarrow")
    assert doctor._package("pyarrow", {"pyarrow": found}).state == "ok"
    assert doctor._package("pyarrow", {}).state == "ok"
    other = doctor._package("pyarrow", {"pyarrow": "1.0.0"})
    assert (other.state, other.remedy) == ("untested", "pip install 'pyarrow==1.0.0'")
    assert "tested: 1.0.0" in other.detail


def test_a_local_build_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor._package("torch", {"torch": "2.13.0"}).state == "ok"


def test_no_lock_file_is_fine(tmp_path: Path) -> None:
    assert doctor.locked_versions(tmp_path / "absent.lock") == {}
    (tmp_path / "some.lock").write_text("# a comment\nPyYAML==6.0.3\ntorch==2.13.0\n")
    assert doctor.locked_versions(tmp_path / "some.lock") == {"pyyaml": "6.0.3", "torch": "2.13.0"}


def test_a_failing_check_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> tuple[doctor.State, str]:
        raise PermissionError("read-only\nfile system")

    monkeypatch.setattr(doctor, "_writes_here", fails)
    finding = by_name(examine())["writing here"]
    assert finding.state == "broken"
    assert finding.detail == "PermissionError: read-only file system"
    assert finding.remedy.startswith("cd to a directory you may write to")


def test_a_directory_without_permission_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Path, "cwd", lambda: Path("/proc/self"))
    finding = doctor._attempt("writing here", doctor._writes_here, "cd elsewhere")
    assert finding.state == "broken"


def test_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    examine()
    assert list(tmp_path.iterdir()) == []


def test_json_and_table_hold_every_finding() -> None:
    findings = [Finding("a [b]", "ok", "c"), Finding("d", "broken", "e", "make env")]
    assert json.loads(as_json(findings)) == {
        "healthy": False,
        "findings": [
            {"what": "a [b]", "state": "ok", "detail": "c", "remedy": "", "required": True},
            {"what": "d", "state": "broken", "detail": "e", "remedy": "make env", "required": True},
        ],
    }
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(findings))
    text = console.export_text()
    for words in ("a [b]", "broken", "make env", "something required is broken"):
        assert words in text


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys; from genrec_dist.cli.doctor import examine; examine(); "
        "print([name for name in ('deepspeed', 'ray', 'triton', 'optuna', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
