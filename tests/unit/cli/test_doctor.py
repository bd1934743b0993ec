"""The doctor: names the remedy for what is missing, and imports nothing heavy for a version."""

import io
import json
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console

from genrec_dist.cli import doctor
from genrec_dist.cli.doctor import Finding, as_json, examine, healthy, render
from genrec_dist.distributed.gpu import unusable_gpu


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.what: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_examine_finds_this_machine_fit_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    findings = examine()
    assert list(tmp_path.iterdir()) == []
    assert healthy(findings), [finding for finding in findings if finding.state == "broken"]
    named = by_name(findings)
    assert {
        "Python",
        "memory",
        "threads",
        "deepspeed",
        "ray",
        "GPU",
        "processes (gloo)",
    } <= named.keys()
    assert metadata.version("torch") in named["torch"].detail
    for check in ("torch computes", "tar in a temporary directory", "writing here"):
        assert named[check].state == "ok"


def test_a_missing_package_and_a_failing_check_are_findings_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("pyarrow", "deepspeed"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    def fails() -> tuple[doctor.State, str]:
        raise PermissionError("read-only\nfile system")

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_writes_here", fails)
    named = by_name(examine())
    assert (named["pyarrow"].state, named["pyarrow"].remedy) == ("broken", "pip install pyarrow")
    optional = named["deepspeed"]
    assert (optional.state, optional.remedy) == ("absent", "pip install 'genrec-dist[zero]'")
    failed = named.pop("writing here")
    assert (failed.state, failed.detail) == ("broken", "PermissionError: read-only file system")
    assert failed.remedy.startswith("cd to a directory you may write to")
    assert not healthy([*named.values()])
    assert healthy([finding for finding in named.values() if finding.what != "pyarrow"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU can be used")
def test_a_driver_that_torch_cannot_use_is_a_finding_and_triton_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert doctor._gpu()[0] == doctor._triton()[0] == "absent"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03\n")
    monkeypatch.setattr(doctor, "unusable_gpu", partial(unusable_gpu, tmp_path / "version"))
    state, detail = doctor._gpu()
    assert state == "broken"
    assert detail.startswith("this machine has an NVIDIA driver 535.54.03")
    # With a GPU to be seen, a kernel is tried, and here it cannot be launched.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = doctor._attempt("Triton on the GPU", doctor._triton, "", False)
    assert found.state == "broken"
    assert "Triton does not launch here" in found.detail
    assert "gcc python3-dev" in found.detail


@pytest.mark.parametrize(
    ("version", "tested", "state"),
    [
        ("2.13.0", {"torch": "2.13.0"}, "ok"),
        ("2.13.0+cpu", {"torch": "2.13.0"}, "ok"),
        ("2.13.0", {}, "ok"),
        ("2.13.0", {"torch": "1.0.0"}, "untested"),
    ],
)
def test_another_version_than_the_tested_one_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, tested: dict[str, str], state: str
) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    found = doctor._package("torch", tested)
    assert found.state == state
    assert ("tested: 1.0.0" in found.detail) == (state == "untested")
    assert found.remedy == ("pip install 'torch==1.0.0'" if state == "untested" else "")


def test_locked_versions_are_those_of_the_lock_file(tmp_path: Path) -> None:
    assert doctor.locked_versions(tmp_path / "absent.lock") == {}
    (tmp_path / "some.lock").write_text("# a comment\nPyYAML==6.0.3\ntorch==2.13.0\n")
    assert doctor.locked_versions(tmp_path / "some.lock") == {"pyyaml": "6.0.3", "torch": "2.13.0"}
    assert "torch" in doctor.locked_versions()


def test_a_directory_without_permission_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Path, "cwd", lambda: Path("/proc/self"))
    assert doctor._attempt("x", doctor._writes_here, "cd elsewhere").state == "broken"


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


def test_examine_imports_nothing_heavy() -> None:
    heavy = ("deepspeed", "ray", "triton", "optuna", "transformers")
    code = (
        "import sys; from genrec_dist.cli.doctor import examine; examine(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
