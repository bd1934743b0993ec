"""What the project says of itself is so: commands, lock, wheel, citation, links."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from places import ROOT
from typer.main import get_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "*.cff")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)


def code_lines(text: str) -> list[str]:
    """Lines of indented code blocks and code spans of a document."""
    return re.findall(r"^    (.+)$", text, flags=re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[str, str]:
    pins = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE
    )
    return {canonical(name): version for name, version in pins}


def click_commands() -> dict:
    from genrec_dist.cli.app import app

    return get_command(app).commands  # type: ignore[attr-defined]


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    assert {"demo", "test", "env"} <= targets
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        named = {
            match
            for line in code_lines(document)
            for match in re.findall(r"\bmake ([a-z]+)\b", line)
        }
        assert named <= targets
        assert "test" in named


def test_every_command_in_the_readme_exists() -> None:
    named = {
        match for line in code_lines(README) for match in re.findall(r"\bgenrec ([a-z]+)", line)
    }
    assert named == set(click_commands())


def test_every_option_in_the_readme_exists() -> None:
    commands = click_commands()
    lines = [line for line in code_lines(README) if line.startswith("genrec ")]
    assert len(lines) >= 9
    for line in lines:
        words = line.split("#")[0].split()
        if len(words) < 2:
            continue
        known = {option for parameter in commands[words[1]].params for option in parameter.opts} | {
            "--help"
        }
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_command_has_an_example_in_its_help() -> None:
    for name, command in click_commands().items():
        assert f"Example: genrec {name}" in (command.help or ""), name


def test_shipped_recipes_in_the_readme_exist() -> None:
    named = {
        match
        for line in code_lines(README)
        for match in re.findall(r"\bgenrec train ([a-z-]+)\b", line)
    }
    shipped = {path.stem for path in (ROOT / "genrec_dist" / "recipes").glob("*.yaml")}
    assert named
    assert named <= shipped


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_in_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for named in re.findall(r"\b(?:launch|docs|tests)/[\w./-]+\.(?:yaml|sh|md|py)\b", text):
        assert (ROOT / named).exists(), named


def test_ci_calls_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
    assert "make test" in code_lines(README)[1]


@pytest.mark.parametrize("code", [0, 3])
def test_ci_fails_when_the_tests_fail_and_finds_the_data(tmp_path: Path, code: int) -> None:
    clone, data = tmp_path / "clone", tmp_path / "shared" / "data"
    (clone / ".ci").mkdir(parents=True)
    data.mkdir(parents=True)
    script = clone / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    (clone / "Makefile").write_text(f'test:\n\t@echo "data=$$GENREC_DATA"; exit {code}\n')
    environment = {name: value for name, value in os.environ.items() if name != "GENREC_DATA"}
    done = subprocess.run(
        ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode != 0) == (code != 0)
    assert f"data={data}" in done.stdout
    environment["GENREC_DATA"] = "/elsewhere"
    done = subprocess.run(
        ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert "data=/elsewhere" in done.stdout


def test_the_lock_pins_every_direct_dependency() -> None:
    wanted = PROJECT["dependencies"] + [
        line
        for extra in ("zero", "tune", "dev")
        for line in PROJECT["optional-dependencies"][extra]
    ]
    names = {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in wanted}
    assert names <= lock().keys(), names - lock().keys()


def test_the_lock_installs_elsewhere() -> None:
    text = (ROOT / "requirements.lock").read_text()
    for line in text.splitlines():
        assert re.fullmatch(r"(#.*)?|[A-Za-z0-9._-]+==[A-Za-z0-9.!_-]+", line), (
            f"not a plain pin: {line}"
        )
    assert "file:" not in text
    assert "nvidia-" not in text


def test_make_env_names_the_remedy_where_python_is_too_old(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["make", "env", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "Python 3.11 or 3.12 with venv is needed" in done.stderr
    assert "make env PYTHON=/path/to/python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_env_looks_for_a_newer_python(tmp_path: Path) -> None:
    """`python3` is too old, `python3.12` is not: stubs that say which of them was asked for an
    environment."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "python3").write_text("#!/bin/sh\nexit 1\n")
    (stubs / "python3.12").write_text(
        '#!/bin/sh\n[ "$2" = venv ] && echo "asked for $3" && exit 7\nexit 0\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:/usr/bin:/bin"}
    done = subprocess.run(
        ["make", "env"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "asked for .venv" in done.stdout
    assert done.returncode != 0


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert [author["family-names"] for author in citation["references"][0]["authors"]] == [
        "Cao",
        "Lio",
    ]


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def test_the_result_table_is_marked_once() -> None:
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not in this environment")
def test_the_wheel_holds_the_house(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for package in ("genrec_dist", "genrec_kernels", "genrec_shards", "genrec_tuning"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= held
    assert "genrec_dist/report.css" in held
    recipes = {path.name for path in (ROOT / "genrec_dist" / "recipes").glob("*.yaml")}
    assert recipes
    assert {f"genrec_dist/recipes/{name}" for name in recipes} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not [
        name for name in held if name.startswith(("tests/", "kernels/", "shards/", "tuning/"))
    ]
