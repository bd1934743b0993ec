#!/usr/bin/env bash
# Two gloo processes on this CPU under a real DeepSpeed engine: launch/cpu_two_ranks_zero.sh STAGE RECIPE [--set a.b=c ...]
# STAGE is the end of a file launch/zeroSTAGE.json: 0, 1, 2, 3, 2_offload or 3_offload.
# Not ACCELERATE_USE_CPU: it turns DeepSpeed off and says nothing. DS_ACCELERATOR is DeepSpeed's own switch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config="$root/launch/zero${1:-}.json"
if [ $# -lt 2 ] || [ ! -f "$config" ]; then
  echo "usage: launch/cpu_two_ranks_zero.sh 0|1|2|3|2_offload|3_offload RECIPE [--set a.b=c ...]" >&2
  exit 2
fi
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export GENREC_EXPECT="processes=2,zero=${1%%_*},device=cpu"
# The agent kills ranks 30 s after a SIGTERM unless it is told to wait for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
unset ACCELERATE_USE_CPU
shift
accelerate=accelerate
if [ -x "$root/.venv/bin/accelerate" ]; then accelerate="$root/.venv/bin/accelerate"; fi
exec "$accelerate" launch --config_file "$root/launch/cpu_two_ranks_zero.yaml" --deepspeed_config_file "$config" \
  -m genrec_dist.train "$@"
