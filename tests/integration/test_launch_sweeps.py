"""Sweeps launched: Ray's cluster file, KubeRay's job, and SLURM with Ray and genrec stood in
for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from launching import LAUNCH, ROOT, Cluster, cluster_in, ended, job_of_a_free_port, until

from genrec_dist.cli.app import app


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as cluster:
        yield cluster


def words_of_genrec(line: str) -> list[str]:
    """The arguments of the `genrec` command in a line of shell, which are seen to be what the
    command takes."""
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


def test_ray_reads_the_cluster_file_and_the_commands_beside_it_are_ours() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli

    written = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())
    config = prepare_config(written)
    validate_config(config)
    with pytest.raises(Exception, match="sety_commands"):
        validate_config(prepare_config({**written, "sety_commands": []}))
    workers, head_ip = written["provider"]["worker_ips"], written["provider"]["head_ip"]
    assert config["max_workers"] == len(workers) == len({head_ip, *workers}) - 1
    starts = []
    for part in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in written[part]:
            subprocess.run(["bash", "-n", "-c", line], check=True, timeout=30)
            if "ray start" in line:
                assert "RAY_AUTH_MODE=token" in line
                starts.append(check_start_of_ray(line))
    head, worker = starts
    assert "--include-dashboard=false" in head
    # Without it no worker is ever started.
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    # Who starts Ray with a token needs one on every machine.
    assert written["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    extra = re.search(r"--editable '\.\[(.*)\]'", " ".join(written["setup_commands"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra is not None
    assert extra[1] in project["optional-dependencies"]

    text = (LAUNCH / "ray_cluster.yaml").read_text()
    lines = re.findall(r"^#   (ray .*)$", text, re.M)
    assert [line.split()[1] for line in lines] == ["get-auth-token", "up", "exec", "down"]
    for line in lines:
        words = shlex.split(line.split("&&")[0] if "genrec" not in line else line)[1:]
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
    images, users = set(), set()
    for group in groups:
        # Others than texts KubeRay refuses.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert set(mounted.values()) == {"/shared", "/dev/shm"}
        images.add(container["image"])
        users.add(str(pod["securityContext"]["runAsUser"]))
    assert len(images) == 1
    assert list(users) == re.findall(r"useradd .*--uid (\d+)", (LAUNCH / "Dockerfile").read_text())
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"].values()
    assert all(isinstance(value, str) for value in variables)
    words_of_genrec(job["spec"]["entrypoint"])


@pytest.mark.parametrize("second", [False, True])
def test_the_kubernetes_job_resumes_at_its_second_try(tmp_path: Path, second: bool) -> None:
    """Through the two shells between the file and the command: KubeRay's submitter, and Ray's job
    on the head."""
    stub = tmp_path / "genrec"
    stub.write_text('#!/usr/bin/env bash\necho "$@"\n')
    stub.chmod(0o755)
    entrypoint = yaml.safe_load((LAUNCH / "kuberay_job.yaml").read_text())["spec"]["entrypoint"]
    entrypoint = entrypoint.replace("/shared", str(tmp_path))
    (tmp_path / "beauty-sweep").mkdir()
    if second:
        (tmp_path / "beauty-sweep" / "sweep.json").touch()

    def output(*command: str) -> str:
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.check_output(command, env=env, text=True, timeout=30)

    words = output("bash", "-c", f"printf '%s\\0' {entrypoint}").split("\0")[:-1]
    expected = f"tune {tmp_path}/beauty.yaml --out {tmp_path}/beauty-sweep --address auto"
    arguments = output("sh", "-c", shlex.join(words)).split()
    assert arguments == expected.split() + ["--resume"] * second


# Listens as a head does; ends with TERM. A worker that finds no head is refused.
FAKE_RAY = """#!/usr/bin/env python3
import os, signal, socket, sys, time
line = (
    f"{os.environ['SLURM_NODEID']} {os.environ['RAY_AUTH_MODE']} {os.environ['RAY_AUTH_TOKEN']} "
    f"{' '.join(sys.argv[1:])}"
)
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
    for name, text in (("srun", SRUN_OF_SWEEP), ("ray", FAKE_RAY), ("genrec", FAKE_GENREC)):
        cluster.stub(name, text)
    (cluster.folder / "ray.up").unlink(missing_ok=True)
    (cluster.folder / "space.yaml").touch()
    fate = {"SLURM_JOB_ID": job_of_a_free_port(), "SLURM_CPUS_PER_TASK": "8", **fate}
    return cluster.submit("tune.sbatch", "space.yaml", "a sweep", *more, nodes=2, gpus=4, **fate)


def test_a_sweep_starts_ray_on_every_node_and_one_driver(cluster: Cluster) -> None:
    number = job_of_a_free_port()
    code, output = ended(sweep(cluster, "--trials", "3", FATE="0", SLURM_JOB_ID=number))
    assert (code, output.strip()) == (0, "sweep a sweep: exit code 0"), output
    calls = sorted(cluster.calls("ray"))
    port = 20_000 + int(number)
    assert [call.split()[:2] for call in calls] == [["0", "token"], ["1", "token"]]
    (token,) = {call.split()[2] for call in calls}
    assert re.fullmatch("[0-9a-f]{64}", token)
    for call in calls:
        options = check_start_of_ray(call.partition("token ")[2].partition(" ")[2])
        assert token not in options  # everyone on a node reads command lines
        size = "--num-cpus 8 --num-gpus 4 --object-store-memory 83886080"
        assert f"{size} --temp-dir /tmp/ray-{number}" in " ".join(options)
    head = f"--head --node-ip-address 127.0.0.1 --port {port} --include-dashboard=false"
    assert head in calls[0]
    assert f"--address 127.0.0.1:{port}" in calls[1]
    (driver,) = cluster.calls("genrec")
    expected = f"tune space.yaml --out a sweep --address 127.0.0.1:{port} --trials 3"
    assert driver == f"token {token} {expected}"
    words_of_genrec("genrec " + expected.replace("a sweep", "a-sweep"))
    assert (cluster.folder / "ray.ended").read_text() == "xx"
    assert not Path(f"/tmp/ray-{number}").exists()


def test_at_the_time_limit_a_sweep_ends_in_good_order_and_goes_on_later(cluster: Cluster) -> None:
    job = sweep(cluster, FATE="wait")
    until(cluster.folder / "waiting", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert (code, output.strip()) == (0, "sweep a sweep: exit code 143 after SIGUSR1")
    assert len(cluster.calls("scontrol")) == 1
    assert ended(sweep(cluster, FATE="0"))[0] == 0
    # The finals are no resume.
    assert ended(sweep(cluster, "--finish", FATE="0"))[0] == 0
    first, second, finals = (call.partition("--out ")[2] for call in cluster.calls("genrec"))
    assert "--resume" not in first
    assert second.endswith("--resume")
    assert finals.endswith("--finish")
    assert "--resume" not in finals
    # A token is a new one each time.
    assert len({call.split()[1] for call in cluster.calls("genrec")}) == 3


def test_a_cancelled_or_failed_sweep_stays_away(cluster: Cluster) -> None:
    job = sweep(cluster, FATE="wait")
    until(cluster.folder / "waiting", job)
    job.terminate()
    code, output = ended(job)
    assert (code, output.strip()) == (143, "sweep a sweep: exit code 143 after SIGTERM")
    code, output = ended(sweep(cluster, FATE="1"))
    assert (code, output.strip()) == (1, "sweep a sweep: exit code 1")
    code, output = ended(sweep(cluster, FATE="0", RAY_FATE="broken"))
    assert code == 1
    assert "Ray did not start on 127.0.0.1" in output
    assert cluster.calls("scontrol") == []


@pytest.mark.dist
@pytest.mark.slow
def test_a_real_sweep_on_two_real_nodes_of_ray(cluster: Cluster, tiny_recipe: Path) -> None:
    domain = {"finetune.learning_rate": {"loguniform": [1e-3, 1e-2]}}
    space = {"base": str(tiny_recipe), "trials": 2, "scheduler": "none", "retries": 0}
    (cluster.folder / "space.yaml").write_text(yaml.safe_dump({**space, "space": domain}))
    cluster.stub("srun", SRUN_OF_SWEEP)
    slurm = {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": job_of_a_free_port()}
    job = cluster.submit("tune.sbatch", "space.yaml", "sweep", nodes=2, gpus=0, **slurm)
    code, output = ended(job)
    assert code == 0, output[-3000:]
    out = cluster.folder / "sweep"
    trials = [json.loads(path.read_text()) for path in sorted((out / "trials").glob("*.json"))]
    assert [trial["status"] for trial in trials] == ["finished", "finished"]
    assert (out / "best.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: sbatch launch/slurm/tune.sbatch"),
        (["x.yaml", "sweep"], "x.yaml: no such space file"),
    ],
)
def test_a_sweep_that_cannot_start_says_why(
    cluster: Cluster, words: list[str], message: str
) -> None:
    code, output = ended(cluster.submit("tune.sbatch", *words, nodes=2, gpus=1))
    assert code == 2
    assert message in output
