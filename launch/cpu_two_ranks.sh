#!/usr/bin/env bash
# Two gloo processes on this CPU: launch/cpu_two_ranks.sh RECIPE [--set a.b=c ...]
# torchrun, because `accelerate launch --cpu --num_processes 2` and a MULTI_CPU file both start one process and say nothing.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: launch/cpu_two_ranks.sh RECIPE [--set a.b=c ...]" >&2
  exit 2
fi
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GENREC_EXPECT="processes=2,zero=none,device=cpu"
# The agent kills ranks 30 s after a SIGTERM unless it is told to wait for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torchrun=torchrun
if [ -x "$root/.venv/bin/torchrun" ]; then torchrun="$root/.venv/bin/torchrun"; fi
exec "$torchrun" --standalone --nproc_per_node 2 -m genrec_dist.train "$@"
