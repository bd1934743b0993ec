# What both .sbatch files do, sourced by their batch shell: start the ranks, let them save when asked to stop, come again.
#
# USR1 comes 120 s before the time limit: the run saves, then the job asks to be queued again.
# TERM comes with a preemption, which Slurm itself queues again, and with scancel, which nobody does: the run saves.
# A job that starts again continues from its newest checkpoint.
set -uo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch launch/slurm/FILE.sbatch RECIPE RUN [--set a.b=c ...]" >&2
  exit 2
fi
recipe=$1 run=$2
shift 2
if [ ! -f "$launch_file" ]; then
  echo "$launch_file: no such launch file; submit the job from the repository" >&2
  exit 2
fi
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi

processes=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=$(head -n 1 <<<"$hosts")
next=''
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then next=$(sed -n 2p <<<"$hosts"); fi
port=$((20000 + SLURM_JOB_ID % 20000))
export GENREC_EXPECT=${GENREC_EXPECT:-processes=$processes,device=gpu}
# The agent kills ranks 30 s after a SIGTERM unless it is told to wait for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
# srun no longer takes this over from the job by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

resume=()
if compgen -G "$run/checkpoints/step-*" >/dev/null; then
  resume=(--resume latest)
elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$run" ]; then
  # This job's own earlier attempt was cut off before its first checkpoint: there is nothing to continue.
  mv "$run" "$run.cut-off-$SLURM_RESTART_COUNT"
fi

signalled='' step=''
stop() {
  signalled=$1
  kill -TERM "$step" 2>/dev/null # srun passes it on to its tasks, accelerate to its ranks
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# Each node's task finds its number only in its own environment, hence the inner shell. It also finds the network interface
# through which the node reaches the others: by itself gloo takes that of the node's own name, which may be 127.0.1.1 or a
# management network, and ranks of two nodes then never meet.
srun --kill-on-bad-exit=1 bash -c '
  peer=$1
  if [ "$SLURM_NODEID" = 0 ]; then peer=$2; fi
  address=$(getent ahosts "$peer" 2>/dev/null | sed -n "1s/ .*//p")
  device=$(ip -o route get "$address" 2>/dev/null | sed -n "s/.* dev \([^ ]*\).*/\1/p")
  if [ -n "$device" ] && [ "$device" != lo ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$device}
  fi
  exec accelerate launch "${@:3:10}" --machine_rank "$SLURM_NODEID" -m genrec_dist.train "${@:13}"' task "$host" "$next" \
  --config_file "$launch_file" --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$processes" \
  --main_process_ip "$host" --main_process_port "$port" \
  "$recipe" --set "run=$run" "$@" ${resume[@]+"${resume[@]}"} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a trap ends `wait` before the run has ended
  wait "$step"
  code=$?
done

# Launchers return 1 whatever a rank returned: the run's own word counts.
status=$(sed -n 's/.*"status": "\([a-z]*\)".*/\1/p' "$run/status.json" 2>/dev/null)
echo "run $run: ${status:-not started}${signalled:+ after SIG$signalled}"
if [ "$signalled" = USR1 ] && [ "$status" = stopped ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit
fi
if [ "$status" = finished ]; then exit 0; fi
if [ "$signalled" = TERM ]; then exit 143; fi
exit $((code == 0 ? 1 : code))
