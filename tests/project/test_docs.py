"""What the project says of itself is so: commands, options, links, lock, citation, wheel."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT
from typer.main import get_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "*.cff")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)
WITH_COMMANDS = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(text: str) -> list[str]:
    """Lines of indented code blocks and code spans of a document."""
    return re.findall(r"^    (.+)$", text, flags=re.MULTILINE) + re.findall(r"`([^`]+)`", text)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def click_app() -> Any:
    from genrec_dist.cli.app import app

    return get_command(app)


def click_commands() -> dict:
    return click_app().commands


def environment_without(name: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != name}


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = {m for line in code_lines(document) for m in re.findall(r"\bmake ([a-z]+)\b", line)}
        assert "test" in named
        assert named <= targets


def test_only_the_tests_of_a_gpu_see_one() -> None:
    """Others start ranks that would share it, and compare with a CPU's tolerances."""
    command = ["make", "-n", "-o", ".venv/.made", "test", "slow", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    calls = [line for line in done.stdout.splitlines() if "/python -m pytest" in line]
    calls = [line for line in calls if not line.startswith("echo")]
    assert len(calls) >= 3
    for call in calls:
        assert ("CUDA_VISIBLE_DEVICES= " in call) != call.endswith("-m gpu"), call


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_every_command_and_option_exists(path: Path) -> None:
    commands = click_commands()
    lines = [line for line in code_lines(path.read_text()) if line.startswith("genrec ")]
    assert len(lines) >= 6
    for line in lines:
        words = line.split("#")[0].split()
        of_all = len(words) > 1 and words[1].startswith("--")
        parameters = (
            (click_app() if of_all else commands[words[1]]).params if len(words) > 1 else []
        )
        known = {"--help"}.union(*(parameter.opts for parameter in parameters))
        assert {word for word in words if word.startswith("--")} <= known, line
        if words[1:2] == ["train"]:
            assert (ROOT / "genrec_dist" / "recipes" / f"{words[2]}.yaml").is_file(), line


def test_every_command_has_an_example_in_its_help() -> None:
    for name, command in click_commands().items():
        assert f"Example: genrec {name}" in (command.help or ""), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_paths_in_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for named in re.findall(r"\b(?:launch|docs|tests)/[\w./-]+\.(?:yaml|sh|md|py)\b", text):
        assert (ROOT / named).exists(), named


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", text)) == pages


def test_every_test_that_guards_a_promise_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"def (test_\w+)", sources))


def test_the_readme_takes_three_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    # A table's row or an image cannot be wrapped.
    assert all(len(line) <= 100 for line in lines if not line.startswith(("|", "!", "    ")))
    assert README.count("<!-- results:begin -->") == README.count("<!-- results:end -->") == 1


@pytest.mark.parametrize("code", [0, 3])
def test_ci_runs_make_test_on_the_data_beside_the_clone(tmp_path: Path, code: int) -> None:
    clone, data = tmp_path / "clone", tmp_path / "shared" / "data"
    (clone / ".ci").mkdir(parents=True)
    data.mkdir(parents=True)
    script = clone / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    (clone / "Makefile").write_text(f'test:\n\t@echo "data=$$GENREC_DATA"; exit {code}\n')
    for given, expected in (({}, data), ({"GENREC_DATA": "/elsewhere"}, "/elsewhere")):
        own = environment_without("GENREC_DATA") | given
        done = subprocess.run(["bash", script], env=own, capture_output=True, text=True, timeout=30)
        assert (done.returncode != 0) == (code != 0)
        assert f"data={expected}" in done.stdout


def test_the_lock_pins_every_direct_dependency_for_any_machine() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *extras["zero"],
        *extras["tune"],
        *extras["llama"],
        *extras["serve"],
        *extras["dev"],
    ]
    pins = re.findall(r"^([A-Za-z0-9._-]+)==\S+$", LOCK, flags=re.MULTILINE)
    names = {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in wanted}
    assert names <= {canonical(name) for name in pins}
    for line in LOCK.splitlines():
        assert re.fullmatch(r"(#.*)?|[A-Za-z0-9._-]+==[A-Za-z0-9.!_-]+", line), line
    assert "nvidia-" not in LOCK


def make_env(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    own = os.environ | ({"PATH": path} if path else {})
    return subprocess.run(
        ["make", "env", *arguments], cwd=folder, env=own, capture_output=True, text=True, timeout=60
    )


def test_make_env_names_the_remedy_where_python_is_too_old(tmp_path: Path) -> None:
    done = make_env(tmp_path, "PYTHON=false")
    assert done.returncode != 0
    assert "make env PYTHON=/path/to/python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_env_looks_for_a_newer_python(tmp_path: Path) -> None:
    """`python3` is too old, `python3.12` is not: stubs say which of them was asked."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    newer = '#!/bin/sh\n[ "$2" = venv ] && echo "asked for $3" && exit 7\nexit 0\n'
    for name, text in (("python3", "#!/bin/sh\nexit 1\n"), ("python3.12", newer)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    done = make_env(tmp_path, path=f"{stubs}:/usr/bin:/bin")
    assert "asked for .venv" in done.stdout
    assert done.returncode != 0


def test_workflows_run_targets_of_the_makefile_and_hooks_of_this_environment() -> None:
    """What runs on another machine is what runs here."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        called |= set(re.findall(r"^make (\w+)", "\n".join(s.get("run", "") for s in steps), re.M))
    assert {"test", "docs", "dist"} == called <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert hook["entry"].removesuffix(" --fix") in checks


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_git_holds_text_pictures_and_one_small_run_alone() -> None:
    """A tracker's database was once committed with the code."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    strange = [
        name
        for name in map(os.fsdecode, done.stdout.split(b"\0")[:-1])
        if not name.startswith(("docs/images/", "tests/fixtures/old_run/"))
        and (ROOT / name).is_file()
        and b"\0" in (ROOT / name).read_bytes()
    ]
    assert strange == []


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not in this environment")
def test_the_wheel_holds_packages_and_shipped_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for package in ("genrec_dist", "genrec_kernels", "genrec_shards", "genrec_tuning"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= held
    data = [path for path in ROOT.glob("genrec_dist/**/*") if path.suffix in (".yaml", ".css")]
    assert len(data) > 5
    assert {name_of(path) for path in data} <= held
    assert not [name for name in held if name.startswith(("tests/", "kernels/", "shards/"))]
    # Where the wheel alone is installed, commands find what lies outside of the packages here.
    code = """
from genrec_dist.cli.app import run_command
from genrec_dist.config.load import shipped_recipes
from genrec_dist.config.shipped import shipped_files, shipped_folder
print(*shipped_recipes(), *shipped_files(shipped_folder("genrec_tuning", "spaces")), flush=True)
run_command(["launch-file", "gpu_node_8_zero2"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, check=True,
    )  # fmt: skip
    names, _, printed = done.stdout.partition("\n")
    recipes = sorted(path.stem for path in (ROOT / "genrec_dist" / "recipes").iterdir())
    assert names.split() == [*recipes, "beauty.yaml", "smoke.yaml"]
    assert printed == (ROOT / "launch" / "gpu_node_8_zero2.yaml").read_text()
