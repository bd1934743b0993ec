"""The container, which nothing here can build: its instructions, and what they copy and install."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

from launching import LAUNCH, ROOT


def instructions() -> list[tuple[str, str]]:
    text = re.sub(
        r"\\\n", " ", re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    )
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()
    ]


def test_the_dockerfile_is_one_docker_would_read() -> None:
    known = {"FROM", "ENV", "RUN", "USER", "WORKDIR", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert set(names) <= known
    assert names[0] == "FROM"
    assert re.fullmatch(
        r"nvidia/cuda:[\d.]+-devel-ubuntu24\.04", instructions()[0][1]
    )  # by tag; 24.04 has Python 3.12
    for name, rest in instructions():
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, timeout=30)
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert names.index("USER") < names.index(
        "COPY"
    )  # so nothing that is copied or installed with pip is root's


def test_what_the_dockerfile_copies_and_installs_is_there() -> None:
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = []
    for name, rest in instructions():
        if name == "COPY":
            words = [word for word in rest.split() if not word.startswith("--")]
            sources += words[:-1]
    assert sorted(sources) == sorted(kept)  # neither more nor less reaches docker
    for source in sources:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        package.split("/")[0]
        for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    }
    assert needed | {project["project"]["readme"], *project["project"]["license-files"]} <= set(
        sources
    )
    installed = re.search(r"pip install .*'\.\[(.*)\]'", (LAUNCH / "Dockerfile").read_text())
    assert installed is not None
    assert set(installed[1].split(",")) <= set(project["project"]["optional-dependencies"])
    assert project["project"]["scripts"]["genrec"]
