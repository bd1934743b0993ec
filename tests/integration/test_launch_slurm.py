"""The batch files of SLURM, under stand-ins for its two commands: signals, requeues, resumes and
what cannot start."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import LAUNCH, Cluster, cluster_in, ended, job_of_a_free_port, started, until
from run_events import events

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


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as cluster:
        yield cluster


def submitted(cluster: Cluster, fate: str, **more: str) -> subprocess.Popen[str]:
    """The job of `demo` on one node, whose trainer is the stand-in."""
    cluster.stub("accelerate", FAKE)
    return cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=2, FATE=fate, **more)


@pytest.mark.parametrize(
    ("name", "nodes", "seconds"), [("one_node", 1, 120), ("two_nodes", 2, 120), ("tune", 2, 180)]
)
def test_the_batch_files_request_of_slurm_what_they_mean(
    name: str, nodes: int, seconds: int
) -> None:
    text = (LAUNCH / "slurm" / f"{name}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert "requeue" in options
    assert options["signal"] == f"B:USR1@{seconds}"
    assert options["ntasks-per-node"] == "1"  # accelerate, or Ray, starts the others of a node
    assert options["nodes"] == str(nodes)


def test_a_job_waits_for_its_ranks_less_long_than_slurm_does() -> None:
    job = (LAUNCH / "slurm" / "job.sh").read_text()
    wait = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", job)
    assert wait is not None
    assert 30 < int(wait[1]) < 120


def test_a_job_starts_one_launcher_per_node(cluster: Cluster) -> None:
    cluster.stub("accelerate", FAKE)
    words = ["demo", "a run", "--set", "seed=1"]
    job = cluster.submit("two_nodes.sbatch", *words, nodes=2, gpus=4, FATE="finished")
    code, output = ended(job)
    assert (code, output.strip()) == (0, "run a run: finished")
    calls = cluster.calls("accelerate")
    rank = [int(re.search(r"--machine_rank (\d)", call)[1]) for call in calls]  # type: ignore[index]
    assert sorted(rank) == [0, 1]
    assert calls[rank.index(1)] == (
        "processes=8,device=gpu | launch --config_file launch/gpu_two_nodes.yaml --num_machines 2 "
        "--num_processes 8 --main_process_ip 127.0.0.1 --main_process_port 20077 --machine_rank 1 "
        "-m genrec_dist.train demo --set run=a run --set seed=1"
    )


GETENT = """#!/usr/bin/env bash
case "$2" in 127.0.0.1) echo "10.0.0.1  STREAM" ;; another) echo "10.0.0.2  STREAM" ;; esac
"""
IP = """#!/usr/bin/env bash
echo "$4" >> ip.calls
case "$4" in
  10.0.0.1) echo "10.0.0.1 dev ib0 src 10.0.0.2 uid 0" ;;
  10.0.0.2) echo "10.0.0.2 via 10.0.0.254 dev eth1 src 10.0.0.1 uid 0" ;;
  *) exit 2 ;;
esac
"""
INTERFACES = """#!/usr/bin/env bash
echo "$SLURM_NODEID ${GLOO_SOCKET_IFNAME:-unset} ${NCCL_SOCKET_IFNAME:-unset}" >> accelerate.calls
mkdir -p run
echo '{"status": "finished"}' > run/status.json
"""


def test_each_node_names_the_interface_that_leads_to_the_others(cluster: Cluster) -> None:
    for name, text in (("getent", GETENT), ("ip", IP), ("accelerate", INTERFACES)):
        cluster.stub(name, text)
    job = cluster.submit("two_nodes.sbatch", "demo", "run", nodes=2, gpus=4)
    assert ended(job)[0] == 0
    # The first node asks for the way to the second, the second for that to the first.
    assert sorted(cluster.calls("accelerate")) == ["0 eth1 =eth1", "1 ib0 =ib0"]
    own = {"GLOO_SOCKET_IFNAME": "bond0"}
    assert ended(cluster.submit("two_nodes.sbatch", "demo", "run", nodes=2, gpus=4, **own))[0] == 0
    assert sorted(cluster.calls("accelerate"))[:2] == ["0 bond0 =eth1", "0 eth1 =eth1"]


def test_a_node_alone_names_no_interface(cluster: Cluster) -> None:
    for name, text in (("getent", GETENT), ("ip", IP), ("accelerate", INTERFACES)):
        cluster.stub(name, text)
    job = cluster.submit("one_node.sbatch", "demo", "run", nodes=1, gpus=4)
    assert ended(job)[0] == 0
    assert cluster.calls("accelerate") == ["0 unset unset"]


def test_the_time_limit_queues_the_job_again_and_it_resumes(cluster: Cluster) -> None:
    job = submitted(cluster, "wait")
    until(cluster.folder / "run" / "events.jsonl", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert (code, output.strip()) == (0, "run run: stopped after SIGUSR1")
    assert cluster.calls("scontrol") == ["requeue 77"]
    assert ended(submitted(cluster, "finished", SLURM_RESTART_COUNT="1"))[0] == 0
    first, second = cluster.calls("accelerate")
    assert second == first + " --resume latest"


def test_a_cancelled_job_saves_and_a_failed_one_fails_and_neither_is_queued_again(
    cluster: Cluster,
) -> None:
    code, output = ended(submitted(cluster, "failed"))
    assert (code, output.strip()) == (1, "run run: failed")
    job = submitted(cluster, "wait")
    until(cluster.folder / "run" / "events.jsonl", job)
    job.terminate()
    code, output = ended(job)
    assert (code, output.strip()) == (143, "run run: stopped after SIGTERM")
    assert cluster.calls("scontrol") == []


def test_a_run_cut_off_before_its_first_checkpoint_is_moved_away(cluster: Cluster) -> None:
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / "events.jsonl").write_text("{}\n")
    assert ended(submitted(cluster, "finished", SLURM_RESTART_COUNT="2"))[0] == 0
    assert (cluster.folder / "run.cut-off-2" / "events.jsonl").exists()
    assert "--resume" not in cluster.calls("accelerate")[0]


def test_a_job_that_cannot_start_says_why(cluster: Cluster) -> None:
    code, output = ended(cluster.submit("one_node.sbatch", nodes=1, gpus=2))
    assert code == 2
    assert "usage: sbatch" in output
    code, output = ended(submitted(cluster, "finished", LAUNCH_FILE="x.yaml"))
    assert code == 2
    assert output.strip() == "x.yaml: no such launch file; submit the job from the repository"


def on_cpu(cluster: Cluster) -> str:
    """The two nodes' ZeRO file for a machine without GPUs: all of it but the GPUs."""
    text = (LAUNCH / "gpu_two_nodes_zero3.yaml").read_text()
    assert "gpu_ids: all\n" in text
    (cluster.folder / "launch" / "on_cpu.yaml").write_text(text.replace("gpu_ids: all\n", ""))
    return "launch/on_cpu.yaml"


@pytest.mark.dist
@pytest.mark.slow
def test_two_launchers_meet_save_at_the_time_limit_and_resume(
    cluster: Cluster, tiny_recipe: Path
) -> None:
    more = {"LAUNCH_FILE": on_cpu(cluster), "GENREC_EXPECT": "processes=2,zero=3,device=cpu"}
    sets = ["--set", "finetune.epochs=60", "--set", "validation.every_epochs=60"]
    words = [tiny_recipe, "run", *sets]

    def submit() -> subprocess.Popen[str]:
        more["SLURM_JOB_ID"] = job_of_a_free_port()
        return cluster.submit("two_nodes.sbatch", *words, nodes=2, gpus=1, **more)

    job, run = submit(), cluster.folder / "run"
    until(run / "checkpoints", job)
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert code == 0, output[-3000:]
    assert output.strip().endswith("run run: stopped after SIGUSR1")
    assert len(cluster.calls("scontrol")) == 1
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    more["SLURM_RESTART_COUNT"] = "1"
    code, output = ended(submit())
    assert code == 0, output[-3000:]
    start = started(run)
    assert (start["processes"], start["distributed_type"]) == (2, "DistributedType.DEEPSPEED")
    resumed_from = [event["resumed_from"] for event in events(run, "start")]
    assert resumed_from == [None, f"run/checkpoints/step-{stopped_at:08d}"]
