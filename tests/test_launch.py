"""Every launch file is opened: what can run here runs to its end, the rest goes through the parsers of accelerate and DeepSpeed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import TINY_RECIPE
from two_ranks import deepspeed_environment, environment

from genrec_dist.cli import app

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent

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
    others = (
        {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file()}
        - set(EXPECTED)
        - set(ZERO)
        - RAY
    )
    assert others == {"README.md", "Dockerfile", *(str(path.relative_to(LAUNCH)) for path in SCRIPTS)}


def test_the_readme_names_every_file() -> None:
    readme = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.rglob("*"):
        assert path.is_dir() or path.name == "README.md" or f"launch/{path.relative_to(LAUNCH)}" in readme


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_accelerate_reads_what_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parser = launch_command_parser()
    options = parser.parse_args(["--config_file", str(LAUNCH / name), "-m", "genrec_dist.train", "tiny"])
    options, defaults, precision_in_file = _validate_launch_command(options)
    found = (
        options.multi_gpu,
        (options.deepspeed_config_file or "") if options.use_deepspeed else None,
        options.num_processes,
        options.num_machines,
        options.use_cpu,
        options.gpu_ids,
    )
    assert found == EXPECTED[name]
    assert (options.mixed_precision, precision_in_file) == ("no", name == "cpu_single.yaml")  # the recipe decides
    if options.use_deepspeed:
        # Weights are made, or read, whole on each rank; spreading them at birth would need from_pretrained to know of it.
        assert options.zero3_init_flag is False
        # Anything but these in one place with a DeepSpeed file is refused at the start.
        assert set(defaults.deepspeed_config) <= {
            "deepspeed_config_file",
            "zero3_init_flag",
            "deepspeed_multinode_launcher",
        }
    if options.num_machines > 1:
        # pdsh, the default, would need a host file and ssh to every node.
        assert options.multi_gpu or options.deepspeed_multinode_launcher == "standard"
        assert options.rdzv_backend == "static"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_key_is_unknown_to_accelerate(name: str) -> None:
    written = yaml.safe_load((LAUNCH / name).read_text())
    config = load_config_from_file(str(LAUNCH / name))
    assert set(written) <= set(config.to_dict()) | {"compute_environment"}
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(written.get("deepspeed_config", {})) <= options


def zero_config(content: dict[str, object]) -> object:
    """DeepSpeed's own reading, with what the program puts in."""
    from deepspeed.runtime.config import DeepSpeedConfig

    filled = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "bf16": {"enabled": True}}
    return DeepSpeedConfig(content | filled)


@pytest.mark.parametrize("name", sorted(ZERO))
def test_deepspeed_reads_what_is_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    content = json.loads((LAUNCH / name).read_text())
    stage, optimizer, weights = ZERO[name]
    config = zero_config(content)
    zero = config.zero_config  # type: ignore[attr-defined]
    found = [None if part is None else part.device for part in (zero.offload_optimizer, zero.offload_param)]
    assert (config.zero_optimization_stage, *found) == (stage, optimizer, weights)  # type: ignore[attr-defined]
    # DeepSpeed looks at no top-level key that it does not know, so all of ours are counted here.
    assert set(content) == {"zero_optimization"} | ({"zero_force_ds_cpu_optimizer"} if optimizer else set())
    if optimizer:
        assert config.zero_force_ds_cpu_optimizer is False  # type: ignore[attr-defined]
    if stage:
        smallest = 166_000_000  # parameters of the paper's model on Beauty
        assert zero.reduce_bucket_size < smallest / 2
        assert zero.overlap_comm is (stage == 3)
    if stage == 3:
        assert zero.max_live_parameters < smallest
        assert zero.max_reuse_distance < smallest


def test_deepspeed_refuses_an_unknown_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    content = json.loads((LAUNCH / "zero3.json").read_text())
    content["zero_optimization"]["stage3_max_live_parameter"] = 1
    with pytest.raises(ValueError, match="stage3_max_live_parameter\n"):
        zero_config(content)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True, timeout=30)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("cpu_*.sh")), ids=lambda path: path.name)
def test_without_a_recipe_it_says_how(path: Path) -> None:
    assert os.access(path, os.X_OK)
    done = subprocess.run([path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert f"usage: launch/{path.name}" in done.stderr


# What runs here


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {tiny_data}\nrun: {tmp_path / 'run'}\n{TINY_RECIPE}", encoding="utf-8")
    return path


def started(run: Path) -> dict[str, object]:
    """The run's first event, after its status was seen to be `finished`."""
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    first: dict[str, object] = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    return first


def launch(arguments: list[str | Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env["PATH"] += f":{BIN}"  # behind, so that all tests find the same ninja: another one builds DeepSpeed's parts anew
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.dist
def test_one_process_under_accelerate(recipe: Path) -> None:
    env = environment()
    del env["ACCELERATE_USE_CPU"]  # the file says it
    launch(
        [BIN / "accelerate", "launch", "--config_file", "launch/cpu_single.yaml", "-m", "genrec_dist.train", recipe],
        env,
    )
    start = started(recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (1, "DistributedType.NO")


@pytest.mark.dist
def test_two_ranks(recipe: Path) -> None:
    launch([LAUNCH / "cpu_two_ranks.sh", recipe, "--set", "seed=1"], environment())
    start = started(recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.MULTI_CPU")
    assert isinstance(start["recipe"], dict)
    assert start["recipe"]["seed"] == 1


@pytest.mark.dist
@pytest.mark.parametrize(
    "stage", ["3_offload", *(pytest.param(s, marks=pytest.mark.slow) for s in ("0", "1", "2", "3", "2_offload"))]
)
def test_two_ranks_under_deepspeed(recipe: Path, stage: str) -> None:
    # The CPU switch of accelerate, which would turn DeepSpeed off, is in the environment: the script removes it.
    launch([LAUNCH / "cpu_two_ranks_zero.sh", stage, recipe, "--set", "precision=bf16"], environment())
    start = started(recipe.parent / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.DEEPSPEED")


# SLURM, under stand-ins for its two commands

SRUN = """#!/usr/bin/env bash
# Every node's task on this machine; a signal goes on to all of them, as srun's does.
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
  wait "$task"; last=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task"; last=$?; done
  if [ $last -gt $code ]; then code=$last; fi
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\nanother\\n'; else echo "$@" >> scontrol.calls; fi
"""
# Trains nothing: writes down its arguments and keeps a run directory as the trainer does.
FAKE = """#!/usr/bin/env bash
echo "$GENREC_EXPECT | $*" >> accelerate.calls
for word in "$@"; do case $word in run=*) run=${word#run=} ;; esac; done
mkdir -p "$run"
say() { echo "{\\"status\\": \\"$1\\", \\"pid\\": 1}" > "$run/status.json"; }
trap 'mkdir -p "$run/checkpoints/step-3"; say stopped; exit 1' TERM
say running
if [ "$FATE" != wait ]; then say "$FATE"; [ "$FATE" = finished ]; exit; fi
touch "$run/events.jsonl"
while true; do sleep 0.1; done
"""


class Cluster:
    """A folder to submit jobs from, with a launch/ of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(LAUNCH, folder / "launch")
        (folder / "bin").mkdir()
        self.jobs: list[subprocess.Popen[str]] = []
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            self.stub(name, text)

    def stub(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def submit(self, file: str, *arguments: str | Path, nodes: int, gpus: int, **more: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        env = deepspeed_environment(PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}:{BIN}", **slurm | more)
        command = ["bash", f"launch/slurm/{file}", *map(str, arguments)]
        pipe = subprocess.PIPE
        job = subprocess.Popen(
            command, env=env, cwd=self.folder, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.jobs.append(job)
        return job

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for job in cluster.jobs:  # a test that failed leaves no trainer behind that waits for a signal
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait(timeout=30)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=400)
    return job.returncode, output


def until(path: Path, job: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["one_node", "two_nodes"])
def test_the_batch_files_ask_slurm_for_what_they_mean(name: str) -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm" / f"{name}.sbatch").read_text(), re.M))
    assert "requeue" in asked
    assert asked["signal"] == "B:USR1@120"
    assert asked["ntasks-per-node"] == "1"  # accelerate starts the ranks of a node
    assert asked["nodes"] == {"one_node": "1", "two_nodes": "2"}[name]
    wait = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", (LAUNCH / "slurm" / "job.sh").read_text())
    assert wait is not None
    assert 30 < int(wait[1]) < 120


def test_a_job_starts_one_launcher_a_node(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    code, output = ended(
        cluster.submit("two_nodes.sbatch", "demo", "a run", "--set", "seed=1", nodes=2, gpus=4, FATE="finished")
    )
    assert (code, output.strip()) == (0, "run a run: finished")
    calls = cluster.calls("accelerate")
    rank = [int(re.search(r"--machine_rank (\d)", call)[1]) for call in calls]  # type: ignore[index]
    assert sorted(rank) == [0, 1]
    assert calls[rank.index(1)] == (
        "processes=8,device=gpu | launch --config_file launch/gpu_two_nodes.yaml --num_machines 2 --num_processes 8 "
        "--main_process_ip 127.0.0.1 --main_process_port 20077 --machine_rank 1 "
        "-m genrec_dist.train demo --set run=a run --set seed=1"
    )


def test_the_time_limit_queues_the_job_again_and_it_resumes(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    job = cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE="wait")
    until(cluster.folder / "run" / "events.jsonl", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert (code, output.strip()) == (0, "run run: stopped after SIGUSR1")
    assert cluster.calls("scontrol") == ["requeue 77"]
    code, _ = ended(
        cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE="finished", SLURM_RESTART_COUNT="1")
    )
    assert code == 0
    first, second = cluster.calls("accelerate")
    assert second == first + " --resume latest"


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    job = cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE="wait")
    until(cluster.folder / "run" / "events.jsonl", job)
    job.terminate()
    code, output = ended(job)
    assert (code, output.strip()) == (143, "run run: stopped after SIGTERM")
    assert cluster.calls("scontrol") == []


def test_what_was_cut_off_before_a_checkpoint_makes_room(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / "events.jsonl").write_text("{}\n")
    code, _ = ended(
        cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE="finished", SLURM_RESTART_COUNT="2")
    )
    assert code == 0
    assert (cluster.folder / "run.cut-off-2" / "events.jsonl").exists()
    assert "--resume" not in cluster.calls("accelerate")[0]


def test_a_failed_run_fails_the_job(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    code, output = ended(cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE="failed"))
    assert (code, output.strip()) == (1, "run run: failed")
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize("fault", ["no recipe", "no launch file"])
def test_a_job_that_cannot_start_says_why(cluster: Cluster, fault: str) -> None:
    if fault == "no recipe":
        code, output = ended(cluster.submit("one_node.sbatch", nodes=1, gpus=2))
        assert "usage: sbatch" in output
    else:
        code, output = ended(cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, LAUNCH_FILE="x.yaml"))
        assert output.strip() == "x.yaml: no such launch file; submit the job from the repository"
    assert code == 2


def on_cpu(cluster: Cluster) -> str:
    """The two nodes' ZeRO file for a machine without GPUs: all of it but the GPUs."""
    text = (LAUNCH / "gpu_two_nodes_zero3.yaml").read_text()
    assert "gpu_ids: all\n" in text
    (cluster.folder / "launch" / "on_cpu.yaml").write_text(text.replace("gpu_ids: all\n", ""))
    return "launch/on_cpu.yaml"


def job_of_a_free_port() -> str:
    """A job number whose rendezvous port nobody holds."""
    for number in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", 20_000 + number))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no free port")


@pytest.mark.dist
@pytest.mark.slow
def test_two_launchers_meet_save_at_the_time_limit_and_resume(cluster: Cluster, recipe: Path) -> None:
    more = {"LAUNCH_FILE": on_cpu(cluster), "GENREC_EXPECT": "processes=2,zero=3,device=cpu"}
    sets = ["--set", "finetune.epochs=60", "--set", "validation.every_epochs=60"]
    job = cluster.submit(
        "two_nodes.sbatch", recipe, "run", *sets, nodes=2, gpus=1, SLURM_JOB_ID=job_of_a_free_port(), **more
    )
    until(cluster.folder / "run" / "checkpoints", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert code == 0, output[-3000:]
    assert output.strip().endswith("run run: stopped after SIGUSR1")
    assert len(cluster.calls("scontrol")) == 1
    stopped_at = json.loads((cluster.folder / "run" / "status.json").read_text())["step"]
    more["SLURM_RESTART_COUNT"] = "1"
    job = cluster.submit(
        "two_nodes.sbatch", recipe, "run", *sets, nodes=2, gpus=1, SLURM_JOB_ID=job_of_a_free_port(), **more
    )
    code, output = ended(job)
    assert code == 0, output[-3000:]
    start = started(cluster.folder / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.DEEPSPEED")
    events = [json.loads(line) for line in (cluster.folder / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["resumed_from"] for event in events if event["event"] == "start"] == [
        None,
        f"run/checkpoints/step-{stopped_at:08d}",
    ]


# Sweeps: Ray's cluster file, KubeRay's job, and SLURM with Ray and genrec stood in for


def words_of_genrec(line: str) -> list[str]:
    """The arguments of the `genrec` command in a line of shell, which are seen to be what the command takes."""
    found = re.search(r"genrec (tune [^;'&|]*)", line)
    assert found is not None, line
    words = [word for word in shlex.split(found[1]) if not word.startswith("$")]
    command = typer.main.get_command(app)
    command.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]  # refuses an unknown option
    return words[1:]


def check_start_of_ray(line: str) -> list[str]:
    """The options of a `ray start`, which are seen to be Ray's."""
    from ray.scripts.scripts import start

    words = shlex.split(line)
    options = words[words.index("start") + 1 :]
    start.make_context("start", list(options))
    return options


def test_ray_reads_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())
    config = prepare_config(written)
    validate_config(config)
    with pytest.raises(Exception, match="sety_commands"):
        validate_config(prepare_config({**written, "sety_commands": []}))
    workers = written["provider"]["worker_ips"]
    assert (config["max_workers"], len({written["provider"]["head_ip"], *workers})) == (len(workers), len(workers) + 1)
    starts = []
    for part in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in written[part]:
            subprocess.run(["bash", "-n", "-c", line], check=True, timeout=30)
            if "ray start" in line:
                assert "RAY_AUTH_MODE=token" in line
                starts.append(check_start_of_ray(line))
    head, worker = starts
    assert "--include-dashboard=false" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head  # without it no worker is ever started
    assert "--address=$RAY_HEAD_IP:6379" in worker
    # Who starts Ray with a token needs one on every machine.
    assert written["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    extra = re.search(r"--editable '\.\[(.*)\]'", " ".join(written["setup_commands"]))
    assert extra is not None
    assert extra[1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_commands_beside_the_cluster_file_are_ours() -> None:
    from ray.scripts.scripts import cli

    lines = [line[8:] for line in (LAUNCH / "ray_cluster.yaml").read_text().splitlines() if line.startswith("#   ray ")]
    assert [line.split()[0] for line in lines] == ["get-auth-token", "up", "exec", "down"]
    for line in lines:
        words = shlex.split(line.split("&&")[0] if "genrec" not in line else line)
        words = [word for word in words if not word.startswith(">")]
        cli.commands[words[0]].make_context(words[0], words[1:])
    assert words_of_genrec(lines[2])[-2:] == ["--address", "auto"]


def test_the_kubernetes_job_is_whole() -> None:
    job = yaml.safe_load((LAUNCH / "kuberay_job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # others KubeRay refuses
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert set(mounted.values()) == {"/shared", "/dev/shm"}
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    uid = re.search(r"useradd .*--uid (\d+)", (LAUNCH / "Dockerfile").read_text())
    assert uid is not None
    assert {group["template"]["spec"]["securityContext"]["runAsUser"] for group in groups} == {int(uid[1])}
    assert all(isinstance(value, str) for value in yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"].values())
    words_of_genrec(job["spec"]["entrypoint"])


@pytest.mark.parametrize("second", [False, True])
def test_the_kubernetes_job_resumes_at_its_second_try(tmp_path: Path, second: bool) -> None:
    """Through the two shells that lie between the file and the command: KubeRay's submitter, and Ray's job on the head."""
    stub = tmp_path / "genrec"
    stub.write_text('#!/usr/bin/env bash\necho "$@"\n')
    stub.chmod(0o755)
    entrypoint = yaml.safe_load((LAUNCH / "kuberay_job.yaml").read_text())["spec"]["entrypoint"]
    entrypoint = entrypoint.replace("/shared", str(tmp_path))
    (tmp_path / "beauty-sweep").mkdir()
    if second:
        (tmp_path / "beauty-sweep" / "sweep.json").touch()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = {"env": env, "capture_output": True, "text": True, "timeout": 30, "check": True}
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {entrypoint}"], **run).stdout.split("\0")[:-1]  # type: ignore[call-overload]
    told = subprocess.run(["sh", "-c", shlex.join(words)], **run).stdout.split()  # type: ignore[call-overload]
    expected = ["tune", f"{tmp_path}/beauty.yaml", "--out", f"{tmp_path}/beauty-sweep", "--address", "auto"]
    assert told == expected + ["--resume"] * second


# Listens as a head does; ends with TERM. A worker that finds no head is refused.
FAKE_RAY = """#!/usr/bin/env python3
import os, signal, socket, sys, time
line = f"{os.environ['SLURM_NODEID']} {os.environ['RAY_AUTH_MODE']} {os.environ['RAY_AUTH_TOKEN']} {' '.join(sys.argv[1:])}"
with open("ray.calls", "a") as file: file.write(line + "\\n")
words = sys.argv[1:]
if os.environ.get("RAY_FATE") == "broken": sys.exit(1)
os.makedirs(words[words.index("--temp-dir") + 1], exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (open("ray.ended", "a").write("x"), os._exit(0)))
if "--head" in words:
    listener = socket.create_server((words[words.index("--node-ip-address") + 1], int(words[words.index("--port") + 1])))
else:
    host, port = words[words.index("--address") + 1].split(":")
    socket.create_connection((host, int(port)))
    open("ray.up", "w")
while True: time.sleep(0.1)
"""
# As srun with --kill-on-bad-exit: a task that fails takes the others with it.
SRUN_OF_SWEEP = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
left=${#tasks[@]} code=0
while [ "$left" -gt 0 ]; do
  wait -n
  last=$? running=$(jobs -rp | wc -l)
  if [ "$running" -lt "$left" ] && [ $last -ne 0 ]; then code=$last; kill -TERM "${tasks[@]}" 2>/dev/null; fi
  left=$running
done
exit $code
"""
FAKE_GENREC = """#!/usr/bin/env bash
echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN $*" >> genrec.calls
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"; touch "$2/sweep.json"
trap 'exit 143' TERM
until [ -e ray.up ]; do sleep 0.05; done
if [ "$FATE" != wait ]; then exit "$FATE"; fi
touch waiting
while true; do sleep 0.1; done
"""


def sweep(cluster: Cluster, *more: str, **fate: str) -> subprocess.Popen[str]:
    cluster.stub("srun", SRUN_OF_SWEEP)
    cluster.stub("ray", FAKE_RAY)
    (cluster.folder / "ray.up").unlink(missing_ok=True)
    cluster.stub("genrec", FAKE_GENREC)
    (cluster.folder / "space.yaml").touch()
    fate.setdefault("SLURM_JOB_ID", job_of_a_free_port())
    return cluster.submit(
        "tune.sbatch", "space.yaml", "a sweep", *more, nodes=2, gpus=4, SLURM_CPUS_PER_TASK="8", **fate
    )


def test_a_sweep_starts_ray_on_every_node_and_one_driver(cluster: Cluster) -> None:
    number = job_of_a_free_port()
    code, output = ended(sweep(cluster, "--trials", "3", FATE="0", SLURM_JOB_ID=number))
    assert (code, output.strip()) == (0, "sweep a sweep: exit code 0"), output
    calls = sorted(cluster.calls("ray"))
    address = f"127.0.0.1:{20_000 + int(number)}"
    assert [call.split()[0] for call in calls] == ["0", "1"]
    tokens = {call.split()[2] for call in calls}
    assert all(call.split()[1] == "token" for call in calls)
    for call in calls:
        options = check_start_of_ray(call.partition("token ")[2].partition(" ")[2])
        assert not tokens & set(options)  # everyone on a node reads command lines
        assert f"--num-cpus 8 --num-gpus 4 --object-store-memory 83886080 --temp-dir /tmp/ray-{number}" in " ".join(
            options
        )
    assert f"--head --node-ip-address 127.0.0.1 --port {20_000 + int(number)} --include-dashboard=false" in calls[0]
    assert f"--address {address}" in calls[1]
    (driver,) = cluster.calls("genrec")
    (token,) = tokens
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert driver == f"token {token} tune space.yaml --out a sweep --address {address} --trials 3"
    words_of_genrec("genrec " + driver.partition(f"{token} ")[2].replace("a sweep", "a-sweep"))
    assert (cluster.folder / "ray.ended").read_text() == "xx"
    assert not Path(f"/tmp/ray-{number}").exists()


def test_a_sweep_s_token_is_a_new_one_each_time(cluster: Cluster) -> None:
    for _ in range(2):
        assert ended(sweep(cluster, FATE="0"))[0] == 0
    assert len({call.split()[1] for call in cluster.calls("genrec")}) == 2


def test_at_the_time_limit_a_sweep_ends_in_good_order_and_goes_on_later(cluster: Cluster) -> None:
    job = sweep(cluster, FATE="wait")
    until(cluster.folder / "waiting", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert (code, output.strip()) == (0, "sweep a sweep: exit code 143 after SIGUSR1")
    assert len(cluster.calls("scontrol")) == 1
    assert ended(sweep(cluster, FATE="0"))[0] == 0
    first, second = (call.partition("--out ")[2] for call in cluster.calls("genrec"))
    assert "--resume" not in first
    assert second.endswith("--resume")


def test_a_cancelled_sweep_stays_away(cluster: Cluster) -> None:
    job = sweep(cluster, FATE="wait")
    until(cluster.folder / "waiting", job)
    job.terminate()
    code, output = ended(job)
    assert (code, output.strip()) == (143, "sweep a sweep: exit code 143 after SIGTERM")
    assert cluster.calls("scontrol") == []


def test_the_finals_are_no_resume(cluster: Cluster) -> None:
    (cluster.folder / "a sweep").mkdir()
    (cluster.folder / "a sweep" / "sweep.json").touch()
    assert ended(sweep(cluster, "--finish", FATE="0"))[0] == 0
    assert cluster.calls("genrec")[0].endswith("--finish")


def test_a_failed_sweep_fails_the_job_and_a_dead_ray_too(cluster: Cluster) -> None:
    code, output = ended(sweep(cluster, FATE="1"))
    assert (code, output.strip()) == (1, "sweep a sweep: exit code 1")
    code, output = ended(sweep(cluster, FATE="0", RAY_FATE="broken"))
    assert code == 1
    assert "Ray did not start on 127.0.0.1" in output
    assert cluster.calls("scontrol") == []


@pytest.mark.dist
@pytest.mark.slow
def test_a_real_sweep_on_two_real_nodes_of_ray(cluster: Cluster, recipe: Path) -> None:
    space = {"base": str(recipe), "trials": 2, "scheduler": "none", "retries": 0,
             "space": {"finetune.learning_rate": {"loguniform": [1e-3, 1e-2]}}}  # fmt: skip
    (cluster.folder / "space.yaml").write_text(yaml.safe_dump(space))
    cluster.stub("srun", SRUN_OF_SWEEP)
    job = cluster.submit(
        "tune.sbatch",
        "space.yaml",
        "sweep",
        nodes=2,
        gpus=0,
        SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_ID=job_of_a_free_port(),
    )
    code, output = ended(job)
    assert code == 0, output[-3000:]
    trials = [json.loads(path.read_text()) for path in sorted((cluster.folder / "sweep" / "trials").glob("*.json"))]
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert (cluster.folder / "sweep" / "best.yaml").exists()


@pytest.mark.parametrize("fault", ["no space", "no such space"])
def test_a_sweep_that_cannot_start_says_why(cluster: Cluster, fault: str) -> None:
    words = [] if fault == "no space" else ["x.yaml", "sweep"]
    code, output = ended(cluster.submit("tune.sbatch", *words, nodes=2, gpus=1))
    assert code == 2
    assert ("usage: sbatch launch/slurm/tune.sbatch" if not words else "x.yaml: no such space file") in output


def test_the_sweep_s_batch_file_asks_slurm_for_what_it_means() -> None:
    text = (LAUNCH / "slurm" / "tune.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert "requeue" in asked
    assert (asked["nodes"], asked["ntasks-per-node"], asked["signal"]) == ("2", "1", "B:USR1@180")


# The container, which nothing here can build


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_one_docker_would_read() -> None:
    known = {"FROM", "ENV", "RUN", "USER", "WORKDIR", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert set(names) <= known
    assert names[0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-devel-ubuntu24\.04", instructions()[0][1])  # by tag; 24.04 has Python 3.12
    for name, rest in instructions():
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, timeout=30)
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert names.index("USER") < names.index("COPY")  # so nothing that is copied or installed with pip is root's


def test_what_the_dockerfile_copies_and_installs_is_there() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = []
    for name, rest in instructions():
        if name == "COPY":
            words = [word for word in rest.split() if not word.startswith("--")]
            sources += words[:-1]
    assert sorted(sources) == sorted(kept)  # neither more nor less reaches docker
    for source in sources:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {package.split("/")[0] for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert needed | {project["project"]["readme"], *project["project"]["license-files"]} <= set(sources)
    installed = re.search(r"pip install .*'\.\[(.*)\]'", (LAUNCH / "Dockerfile").read_text())
    assert installed is not None
    assert set(installed[1].split(",")) <= set(project["project"]["optional-dependencies"])
    assert project["project"]["scripts"]["genrec"]
