"""Every launch file is opened: what can run here runs to its end, the rest goes through the parsers
of accelerate and DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import BIN, LAUNCH, ROOT, started
from two_ranks import environment

# File -> (DDP on GPUs, DeepSpeed file, processes, machines, on a CPU, GPUs).
EXPECTED = {
    "cpu_single.yaml": (False, None, 1, 1, True, "all"),
    "cpu_two_ranks_zero.yaml": (False, "", 2, 1, False, "all"),
    "gpu_single_3090.yaml": (False, None, 1, 1, False, "0"),
    "gpu_node_8.yaml": (True, None, 8, 1, False, "all"),
    "gpu_node_8_zero1.yaml": (False, "launch/zero1.json", 8, 1, False, "all"),
    "gpu_node_8_zero2.yaml": (False, "launch/zero2.json", 8, 1, False, "all"),
    "gpu_node_8_zero3.yaml": (False, "launch/zero3.json", 8, 1, False, "all"),
    "gpu_node_8_zero2_offload.yaml": (False, "launch/zero2_offload.json", 8, 1, False, "all"),
    "gpu_node_8_zero3_offload.yaml": (False, "launch/zero3_offload.json", 8, 1, False, "all"),
    "gpu_two_nodes.yaml": (True, None, 16, 2, False, "all"),
    "gpu_two_nodes_zero3.yaml": (False, "launch/zero3.json", 16, 2, False, "all"),
}
# File -> (stage, where the optimizer's state lies, where the weights lie).
ZERO = {
    "zero0.json": (0, None, None),
    "zero1.json": (1, None, None),
    "zero2.json": (2, None, None),
    "zero3.json": (3, None, None),
    "zero2_offload.json": (2, "cpu", None),
    "zero3_offload.json": (3, "cpu", "cpu"),
}
RAY = {"ray_cluster.yaml", "kuberay_job.yaml"}
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("slurm/*")])


# What the files say


def test_every_file_has_an_expectation() -> None:
    assert {path.name for path in LAUNCH.glob("*.yaml")} == set(EXPECTED) | RAY
    assert {path.name for path in LAUNCH.glob("*.json")} == set(ZERO)
    known = {*EXPECTED, *ZERO, *RAY, "README.md", "Dockerfile", *(path.name for path in SCRIPTS)}
    assert {path.name for path in LAUNCH.rglob("*") if path.is_file()} == known


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_accelerate_reads_what_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parser = launch_command_parser()
    words = ["--config_file", str(LAUNCH / name), "-m", "genrec_dist.train", "tiny"]
    options, defaults, precision_in_file = _validate_launch_command(parser.parse_args(words))
    found = (
        options.multi_gpu,
        (options.deepspeed_config_file or "") if options.use_deepspeed else None,
        options.num_processes,
        options.num_machines,
        options.use_cpu,
        options.gpu_ids,
    )
    assert found == EXPECTED[name]
    # The recipe decides.
    assert (options.mixed_precision, precision_in_file) == ("no", name == "cpu_single.yaml")
    if options.use_deepspeed:
        # Weights are made, or read, whole on each rank; to shard them at once, from_pretrained
        # would have to know of it.
        assert options.zero3_init_flag is False
        # Other keys beside a DeepSpeed file are refused at the start.
        allowed = {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher"}
        assert set(defaults.deepspeed_config) <= allowed
    if options.num_machines > 1:
        # pdsh, the default, would need a host file and ssh to every node.
        assert options.multi_gpu or options.deepspeed_multinode_launcher == "standard"
        assert options.rdzv_backend == "static"
    # No key is unknown to accelerate.
    written = yaml.safe_load((LAUNCH / name).read_text())
    config = load_config_from_file(str(LAUNCH / name))
    assert set(written) <= set(config.to_dict()) | {"compute_environment"}
    known = {action.dest for action in parser._actions}
    assert set(written.get("deepspeed_config", {})) <= known


@pytest.mark.parametrize("name", sorted(ZERO))
def test_deepspeed_reads_what_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads((LAUNCH / name).read_text())
    stage, optimizer, weights = ZERO[name]
    filled = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config = DeepSpeedConfig(content | filled | {"bf16": {"enabled": True}})
    zero = config.zero_config
    offload = [part and part.device for part in (zero.offload_optimizer, zero.offload_param)]
    assert (config.zero_optimization_stage, *offload) == (stage, optimizer, weights)
    # DeepSpeed ignores top-level keys that it does not know, so all of ours are counted here.
    own = {"zero_force_ds_cpu_optimizer"} if optimizer else set()
    assert set(content) == {"zero_optimization"} | own
    if optimizer:
        assert config.zero_force_ds_cpu_optimizer is False
    if stage:
        smallest = 166_000_000  # parameters of the paper's model on Beauty
        assert zero.reduce_bucket_size < smallest / 2
        assert zero.overlap_comm is (stage == 3)
    if stage == 3:
        assert zero.max_live_parameters < smallest
        assert zero.max_reuse_distance < smallest


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_without_a_recipe_says_how(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
    if path.name.startswith("cpu_"):
        assert os.access(path, os.X_OK)
        done = subprocess.run([path], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert f"usage: launch/{path.name}" in done.stderr


# What runs here


def launch(arguments: list[str | Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # Last, so that all tests find the same ninja: another one builds DeepSpeed's parts anew.
    env["PATH"] += f":{BIN}"
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.dist
@pytest.mark.ranks
def test_one_process_under_accelerate(tiny_recipe: Path) -> None:
    env = environment()
    del env["ACCELERATE_USE_CPU"]  # the file says it
    config = ["--config_file", "launch/cpu_single.yaml"]
    launch([BIN / "accelerate", "launch", *config, "-m", "genrec_dist.train", tiny_recipe], env)
    start = started(tiny_recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (1, "DistributedType.NO")


@pytest.mark.dist
@pytest.mark.ranks
def test_two_ranks(tiny_recipe: Path) -> None:
    launch([LAUNCH / "cpu_two_ranks.sh", tiny_recipe, "--set", "seed=1"], environment())
    start = started(tiny_recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.MULTI_CPU")
    assert isinstance(start["recipe"], dict)
    assert start["recipe"]["seed"] == 1


@pytest.mark.dist
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("3_offload", marks=pytest.mark.ranks),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("0", "1", "2", "3", "2_offload")),
    ],
)
def test_two_ranks_under_deepspeed(tiny_recipe: Path, stage: str) -> None:
    # Accelerate's CPU switch, which would turn DeepSpeed off, is in the environment: the script
    # removes it.
    script = LAUNCH / "cpu_two_ranks_zero.sh"
    launch([script, stage, tiny_recipe, "--set", "precision=bf16"], environment())
    start = started(tiny_recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.DEEPSPEED")
