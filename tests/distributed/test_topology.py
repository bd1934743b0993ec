"""What was requested, read where it was said, and real launches that must stop, or go on."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from places import HELPERS, ROOT
from tiny import tiny_log
from two_ranks import deepspeed_environment, environment

from genrec_dist.distributed.launch_check import (
    Launch,
    Request,
    first_difference,
    launch_above,
    launch_arguments,
    requested,
)

BIN = Path(sys.executable).parent
ONE_PROCESS = {"processes": "1", "zero": "none", "precision": "fp32", "device": "cpu"}


def requests_of(environ: dict[str, str], launch: Launch | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for request in requested(environ, launch):
        found.setdefault(request.what, []).append(request.value)
    return found


# Command lines


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("/v/bin/python /v/bin/accelerate launch --cpu train.py", ["--cpu", "train.py"]),
        ("/v/bin/python -m accelerate.commands.launch --cpu train.py", ["--cpu", "train.py"]),
        ("python -u -m accelerate.commands.accelerate_cli launch train.py", ["train.py"]),
        ("/v/bin/python /v/bin/accelerate-launch --cpu train.py", ["--cpu", "train.py"]),
        ("/v/bin/python /v/lib/accelerate/commands/launch.py --cpu t.py", ["--cpu", "t.py"]),
        ("timeout 60 accelerate launch --cpu train.py", ["--cpu", "train.py"]),
        ("python train.py", None),
        ("accelerate config", None),
        ("bash -c 'accelerate launch x'", None),
        ("torchrun --nproc_per_node 2 t.py", None),
    ],
)
def test_launch_arguments_knows_a_launch_however_it_is_written(
    line: str, arguments: list[str] | None
) -> None:
    assert launch_arguments(shlex.split(line)) == arguments


def parsed(*arguments: str, folder: Path = ROOT) -> dict[str, list[str]]:
    words = [*arguments, "-m", "genrec_dist.train", "tiny", "--set", "seed=1"]
    return requests_of({}, Launch(words, folder))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", "/nonexistent")


# Arguments of `accelerate launch | what they ask for, in order.
LAUNCHES = """
--cpu --num_processes 2                    | processes=2 zero=none device=cpu
--cpu --num_processes=2 --mixed_precision=bf16 | processes=2 zero=none precision=bf16 device=cpu
--multi_gpu --num-processes 8 --mixed_precision no | processes=8 zero=none device=gpu
--use_deepspeed --zero_stage 3 --num_processes 4   | processes=4 zero=3
--use_deepspeed --num_processes 4                  | processes=4 zero=2
--use_deepspeed --zero_stage 1 --deepspeed_config_file launch/zero3.json --num_processes 4 \
                                           | processes=4 zero=3 zero=1
--gpu_ids 0 --num_processes 1              | processes=1 zero=none device=gpu
--config_file launch/cpu_single.yaml       | processes=1 zero=none device=cpu
--config_file launch/gpu_single_3090.yaml  | processes=1 zero=none device=gpu
--config_file launch/gpu_node_8.yaml       | processes=8 zero=none device=gpu
--config_file launch/gpu_node_8.yaml --num_processes 4 | processes=4 zero=none device=gpu
--config_file launch/gpu_node_8_zero1.yaml | processes=8 zero=1 device=gpu
--config_file launch/gpu_node_8_zero3_offload.yaml | processes=8 zero=3 device=gpu
--config_file launch/gpu_two_nodes.yaml    | processes=16 zero=none device=gpu
--config_file launch/gpu_two_nodes_zero3.yaml | processes=16 zero=3 device=gpu
--config_file launch/cpu_two_ranks_zero.yaml --deepspeed_config_file launch/zero1.json \
                                           | processes=2 zero=1
"""
VARIABLES = """
WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 SLURM_STEP_NUM_TASKS=1 | processes=2
SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=4      | processes=4
OMPI_COMM_WORLD_SIZE=3                     | processes=3
ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 | zero=3
ACCELERATE_USE_DEEPSPEED=true              | zero=2
ACCELERATE_DEEPSPEED_ZERO_STAGE=3          |
ACCELERATE_MIXED_PRECISION=bf16 ACCELERATE_USE_CPU=true | precision=bf16 device=cpu
GENREC_EXPECT=processes=8,zero=none,precision=fp16,device=gpu \
                                           | processes=8 zero=none precision=fp16 device=gpu
"""


def rows(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def found(requests: dict[str, list[str]]) -> str:
    return " ".join(f"{what}={value}" for what, values in requests.items() for value in values)


@pytest.mark.parametrize(("arguments", "expected"), rows(LAUNCHES))
def test_accelerate_reads_its_own_command_line(
    arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert found(parsed(*arguments.split())) == expected


@pytest.mark.parametrize(("environ", "expected"), rows(VARIABLES))
def test_variables_are_read(environ: str, expected: str) -> None:
    assert found(requests_of(dict(part.split("=", 1) for part in environ.split()))) == expected


def test_nothing_is_requested_that_nobody_set() -> None:
    assert launch_above() is None
    assert parsed() == {"zero": ["none"]}
    environ = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "PATH": "/bin"}
    assert requests_of(environ) == {}


def test_a_configuration_file_is_relative_to_the_launchers_directory(tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text((ROOT / "launch" / "cpu_single.yaml").read_text())
    assert parsed("--config_file", "here.yaml", folder=tmp_path)["processes"] == ["1"]


def test_the_whole_line_is_named_up_to_the_program() -> None:
    launch = Launch(["--cpu", "--num_processes", "2", "-m", "genrec_dist.train", "tiny"], ROOT)
    assert {r.by for r in requested({}, launch)} == {"accelerate launch --cpu --num_processes 2"}


def test_reading_a_launch_leaves_logging_alone() -> None:
    code = (
        "import logging; from pathlib import Path; "
        "from genrec_dist.distributed.launch_check import Launch, requested; "
        "list(requested({}, Launch(['--cpu', 't.py'], Path()))); print(logging.root.handlers)"
    )
    env = environment(ACCELERATE_ENABLE_RICH="true")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not logging.getLogger("accelerate.commands.launch").disabled


def test_the_stage_is_read_out_of_the_deepspeed_file(tmp_path: Path) -> None:
    environ = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json"),
    }
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert requested(environ, None) == [Request("zero", "1", str(tmp_path / "zero.json"))]
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    assert requests_of(environ | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == {"zero": ["3"]}
    for text in ("{}", "no json", '{"zero_optimization": 2}'):
        (tmp_path / "zero.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"zero\.json: no DeepSpeed file with zero_optimization\.stage"
        ):
            requested(environ, None)
    (tmp_path / "zero.json").unlink()
    with pytest.raises(ValueError, match=r"zero\.json: no DeepSpeed file"):
        requested(environ, None)


@pytest.mark.parametrize(
    "text", ["zero=4", "processes=two", "zero", "stage=2", "precision=fp8", "processes="]
)
def test_an_expectation_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"GENREC_EXPECT: {text} is not one of processes=N, zero=none"
    ):
        requested({"GENREC_EXPECT": f"device=cpu,{text}"}, None)


# Differences


@pytest.mark.parametrize("what", ["processes", "zero", "precision", "device"])
def test_first_difference_names_source_and_remedy(what: str) -> None:
    other = {"processes": "2", "zero": "3", "precision": "bf16", "device": "gpu"}[what]
    same = [Request(k, v, "x") for k, v in ONE_PROCESS.items()]
    assert first_difference(same, ONE_PROCESS) is None
    line = first_difference([*same, Request(what, other, "FILE")], ONE_PROCESS)
    assert line is not None
    asked_for, came = line.split(", the run got ")
    assert asked_for.startswith("FILE asks for ")
    assert other in asked_for
    assert len(came.split(": ", 1)[1]) > 20
    assert "\n" not in line


def test_deepspeed_that_nobody_asked_for_is_a_difference() -> None:
    line = first_difference([Request("zero", "none", "FILE")], ONE_PROCESS | {"zero": "2"})
    got = "asks for no DeepSpeed, the run got DeepSpeed ZeRO stage 2"
    assert line is not None
    assert f"FILE {got}: unset ACCELERATE_USE_DEEPSPEED" in line


# Real launches


def stopped(
    command: list[str | Path], folder: Path, env: dict[str, str], recipe: str = "precision: fp32"
) -> str:
    """What the trainer said, launched by `command`, if any, so that it has to stop before it takes
    a step."""
    if not (folder / "data").exists():
        (folder / "log.txt").write_text(tiny_log(), encoding="utf-8")
        write_shards(prepare(folder / "log.txt", folder / "data"), folder / "data" / "shards")
    (folder / "recipe.yaml").write_text(
        f"data: {folder}/data\nrun: {folder}/run\n{recipe}\nfinetune: {{epochs: 1}}\n"
    )
    trainer = ["-m", "genrec_dist.train", folder / "recipe.yaml"]
    if command:
        done = subprocess.run(
            [*command, *trainer], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    else:
        done = forked.run(trainer, env, timeout=300)
    assert done.returncode != 0
    assert not (folder / "run").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("genrec: ")]
    assert said, done.stderr[-3000:]
    return said[0]


@pytest.mark.dist
@pytest.mark.ranks
def test_two_processes_that_become_one_stop(tmp_path: Path) -> None:
    env = environment()
    del env["ACCELERATE_USE_CPU"]
    way_out = (
        "asks for 2 processes, the run got 1 process: accelerate alone starts one process on a "
        "CPU; start them with launch/cpu_two_ranks.sh or torchrun"
    )
    command: list[str | Path] = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    assert (
        stopped(command, tmp_path, env)
        == f"genrec: accelerate launch --cpu --num_processes 2 {way_out}"
    )
    config = (ROOT / "launch" / "cpu_single.yaml").read_text()
    config = config.replace('distributed_type: "NO"', "distributed_type: MULTI_CPU")
    file = tmp_path / "multi.yaml"
    file.write_text(config.replace("num_processes: 1", "num_processes: 2"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    assert (
        stopped(command, tmp_path, env)
        == f"genrec: accelerate launch --config_file {tmp_path}/multi.yaml {way_out}"
    )


@pytest.mark.dist
@pytest.mark.ranks
def test_deepspeed_that_the_cpu_switch_turns_off_stops(tmp_path: Path) -> None:
    options = "--use_deepspeed --zero_stage 2 --num_processes 2 --main_process_port 0"
    said = stopped([BIN / "accelerate", "launch", *options.split()], tmp_path, environment())
    assert said == (
        f"genrec: accelerate launch {options} asks for DeepSpeed ZeRO stage 2, the run got no "
        "DeepSpeed: unset ACCELERATE_USE_CPU, which turns DeepSpeed off; on a CPU set "
        "DS_ACCELERATOR=cpu instead"
    )


@pytest.mark.dist
def test_tasks_that_do_not_know_of_each_other_stop(tmp_path: Path) -> None:
    # As `srun -n 2 genrec train` would start them: each would train the whole run, in one
    # directory.
    said = stopped([], tmp_path, environment(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0"))
    assert said.startswith(
        "genrec: SLURM_STEP_NUM_TASKS=2 asks for 2 processes, the run got 1 process: "
    )


@pytest.mark.dist
@pytest.mark.ranks
def test_a_deepspeed_launch_gets_what_it_asks_for_and_no_other(tmp_path: Path) -> None:
    options = ["--config_file", "launch/cpu_two_ranks_zero.yaml"]
    options += ["--deepspeed_config_file", "launch/zero2.json"]
    done = subprocess.run(
        [BIN / "accelerate", "launch", *options, HELPERS / "topology_rank.py", tmp_path],
        env=deepspeed_environment(), cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["got"] == {"processes": "2", "zero": "2", "precision": "bf16", "device": "cpu"}
    for rank in (first, second):
        assert rank["nothing more"] == rank["the same"] == "well"
        assert (
            "asks for DeepSpeed ZeRO stage 3, the run got DeepSpeed ZeRO stage 2"
            in rank["another stage"]
        )
        assert rank["another precision"].startswith(
            "recipe asks for precision fp32, the run got precision bf16"
        )
        assert "asks for 4 processes, the run got 2 processes" in rank["another number"]
        assert rank["ranks differ"].startswith(
            "rank 1 got DeepSpeed ZeRO stage 3, rank 0 DeepSpeed ZeRO stage 2"
        )
    elsewhere = "rank {} did not get what was requested: its own message says what"
    assert first["one rank asks for more"] == elsewhere.format(1)
    assert "asks for DeepSpeed ZeRO stage 1" in second["one rank asks for more"]
    assert "zeros=1 is not one of" in first["one rank cannot be read"]
    assert second["one rank cannot be read"] == elsewhere.format(0)
