"""The container, which nothing here can build: what its instructions copy and install."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

from launching import LAUNCH, ROOT
from typer.main import get_command

from genrec_dist.cli.app import app

TEXT = (LAUNCH / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.M))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in lines]


def test_nothing_is_copied_or_run_as_root() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    for name, rest in instructions():
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, timeout=30)
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert names.index("USER") < names.index("COPY")


def test_what_the_dockerfile_copies_and_installs_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [rest.split() for name, rest in instructions() if name == "COPY"]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    # Neither more nor less reaches docker.
    assert sorted(sources) == sorted(line[1:] for line in ignored if line.startswith("!"))
    for source in sources:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {package.split("/")[0] for package in packages}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(sources)
    installed = re.findall(r"pip install .*'\.\[(.*)\]'", TEXT)
    assert len(installed) == 2
    extras = {extra for each in installed for extra in each.split(",")}
    assert extras <= set(project["project"]["optional-dependencies"])


def test_a_change_of_the_program_does_not_install_torch_again() -> None:
    """An instruction is run again where a file changes that an earlier one has copied."""
    torch = next(i for i, (_, rest) in enumerate(instructions()) if " torch " in f"{rest} ")
    copied = " ".join(rest for name, rest in instructions()[:torch] if name == "COPY")
    assert "requirements.lock" in copied
    assert "genrec_dist" not in copied
    assert "pyproject.toml" not in copied


def test_the_target_that_serves_gives_the_command_options_that_it_has() -> None:
    """Only its run is left to say, and it has to be open beyond the container."""
    stages = TEXT.split("\nFROM ")
    (stage,) = [text for text in stages if text.startswith("base AS serve")]
    entry = re.search(r"^ENTRYPOINT (.*)$", stage, re.M)
    assert entry is not None
    words = json.loads(entry[1])
    assert words[:2] == ["genrec", "serve"]
    options = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = options.make_context("serve", [*words[2:], "/runs/mine"])
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 8000)
    # The last stage is the one that is built where no target is named.
    assert '["genrec"]' in stages[-1]
