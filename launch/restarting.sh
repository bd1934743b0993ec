#!/usr/bin/env bash
# One machine whose ranks are started again when one is lost or stuck: launch/restarting.sh RECIPE RUN [--set a.b=c ...]
# A rank for each GPU; with CPU_RANKS=2 in front of it, two gloo ranks on this CPU. Where RUN has begun, it goes on from its
# last checkpoint, also when this command is given again. MAX_RESTARTS (3) is how often the ranks are started again;
# GENREC_STUCK_SECONDS (500) how long no step and no batch of a validation may end: then the rank that is furthest back is
# named, and all start again.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/restarting.sh RECIPE RUN [--set a.b=c ...]" >&2
  exit 2
fi
recipe=$1 run=$2
shift 2
ranks=${CPU_RANKS:-gpu}
if [ -n "${CPU_RANKS:-}" ]; then
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GENREC_EXPECT="processes=$CPU_RANKS,zero=none,device=cpu"
else
  export GENREC_EXPECT="${GENREC_EXPECT:-device=gpu}"
  # NCCL's flight recorder: what each rank had begun, written to a file when a collective takes too long. NCCL ends a
  # process by itself after 10 minutes; a stuck rank is to be named before.
  export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT=1
fi
export GENREC_STUCK_SECONDS="${GENREC_STUCK_SECONDS:-500}"
# The agent kills ranks 30 s after a SIGTERM unless it is told to wait for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
# Otherwise all attempts share one store, in which gloo ranks find the addresses of the attempt before, and wait for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torchrun=torchrun
if [ -x "$root/.venv/bin/torchrun" ]; then torchrun="$root/.venv/bin/torchrun"; fi
exec "$torchrun" --standalone --nproc_per_node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
  -m genrec_dist.train "$recipe" --set "run=$run" --resume auto "$@"
