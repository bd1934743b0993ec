"""The launch files: accelerate's own parser reads them, and they ask for what their names say."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
EXPECTED = {
    "cpu_single.yaml": ("NO", 1, True, "no"),
    "gpu_single_3090.yaml": ("NO", 1, False, "bf16"),
    "gpu_node_8.yaml": ("MULTI_GPU", 8, False, "bf16"),
}


def test_every_file_has_an_expectation() -> None:
    assert {path.name for path in LAUNCH.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_accelerate_reads_what_is_meant(name: str) -> None:
    config = load_config_from_file(str(LAUNCH / name))
    found = (str(config.distributed_type.value), config.num_processes, config.use_cpu, config.mixed_precision)
    assert found == EXPECTED[name]
    assert config.num_machines == 1
    assert not config.deepspeed_config


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_key_is_unknown_to_accelerate(name: str) -> None:
    written = yaml.safe_load((LAUNCH / name).read_text())
    config = load_config_from_file(str(LAUNCH / name))
    assert set(written) <= set(config.to_dict()) | {"compute_environment"}


def test_the_readme_names_every_file() -> None:
    readme = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"launch/{path.name}" in readme


def stub_torchrun(directory: Path) -> Path:
    """The script beside a stub that tells what it was called with, so that nothing is trained here."""
    (directory / "launch").mkdir()
    (directory / ".venv" / "bin").mkdir(parents=True)
    script, stub = directory / "launch" / "cpu_two_ranks.sh", directory / ".venv" / "bin" / "torchrun"
    script.write_bytes((LAUNCH / "cpu_two_ranks.sh").read_bytes())
    stub.write_text('#!/bin/sh\necho "$ACCELERATE_USE_CPU" "$@"\n')
    for path in (script, stub):
        path.chmod(0o755)
    return script


def test_two_ranks_go_through_torchrun_with_the_cpu_switch(tmp_path: Path) -> None:
    assert os.access(LAUNCH / "cpu_two_ranks.sh", os.X_OK)
    script = stub_torchrun(tmp_path)
    done = subprocess.run([script, "demo", "--set", "seed=1"], capture_output=True, text=True, timeout=30, check=True)
    said = done.stdout.strip()
    assert said == "true --standalone --nproc_per_node 2 -m genrec_dist.train demo --set seed=1"


def test_without_a_recipe_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run([stub_torchrun(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "usage: launch/cpu_two_ranks.sh RECIPE" in done.stderr
