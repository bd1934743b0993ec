#!/usr/bin/env bash
# Tests and benchmarks on a GPU, within ten minutes and without a network: launch/gpu_check.sh [--cpu OUT]
# GPU tests, training steps case by case, captured steps, lists beside a CPU's, then the kernels, decoding and latency;
# nothing has to be installed. Each part is a line of JSON as soon as it is measured. Tables with the
# card's name and the commit go to benchmarks/results. A step that fails or runs out of time does not
# stop the others. Exit code: 0 all done, 1 a step failed, 2 there is no GPU.
# --cpu OUT: the same steps at tiny sizes on the CPU, to try the script; tables go to OUT.
# PYTHON: the interpreter, default python3. GENREC_WHEELS: a folder of wheels to use besides.
# GENREC_COMMIT: the commit's name, where the checkout came without its history.
# GPU_CHECK_SECONDS: the time for all, default 600, of which the budgets leave 60; on a CPU 1800. GPU_CHECK_STEPS: some of the steps.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
all_steps="facts tests steps graph lists kernels beam latency"
small=() out="$root/benchmarks/results" factor=1
case "${1:-}" in
  "") ;;
  --cpu)
    if [ $# -lt 2 ]; then echo "usage: launch/gpu_check.sh [--cpu OUT]" >&2; exit 2; fi
    small=(--small) out=$2 factor=5 ;;
  *) echo "usage: launch/gpu_check.sh [--cpu OUT]" >&2; exit 2 ;;
esac
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
# A CPU may be shared with other work.
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-$((factor == 1 ? 600 : 1800))}))

export PYTHONPATH="$root:$root/kernels:$root/shards:$root/tuning${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${GENREC_WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$GENREC_WHEELS"/*.whl || exit 1
  PYTHONPATH="$PYTHONPATH:$work/site"
fi
if [ ${#small[@]} -gt 0 ]; then
  export CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "launch/gpu_check.sh: no NVIDIA GPU for $python and its torch here (PYTHON=... names another); --cpu OUT tries the script without one" >&2
  exit 2
fi

failed=0
steps=" ${GPU_CHECK_STEPS:-$all_steps} summary "
step() { # NAME BUDGET COMMAND...
  local name=$1 budget=$(($2 * factor)) start=$SECONDS code
  shift 2
  [[ $steps == *" $name "* ]] || return 0
  local left=$((deadline - SECONDS))
  if [ "$left" -lt "$budget" ]; then budget=$((left > 1 ? left : 1)); fi
  timeout -k 5 "$budget" "$@" > "$work/$name.log" 2>&1
  code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" "$budget" >> "$work/status"
  case $code in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "$name: ran out of its $budget s"; failed=1 ;;
    *) echo "$name: failed with exit code $code"; tail -n 5 "$work/$name.log" | sed 's/^/  /'; failed=1 ;;
  esac
}
measure() { # NAME BUDGET SLOWEST: no part begins when less than the slowest part's seconds are left
  local left=$((deadline - SECONDS)) seconds=$(($2 * factor))
  if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
  step "$1" "$2" "$python" -m genrec_dist.bench.gpu.check "$1" --out "$out" --seconds $((seconds - $3 * factor)) ${small[@]+"${small[@]}"}
}

measure facts 20 0
if [[ $steps != *" tests "* ]]; then
  :
elif ! "$python" -c 'import pytest' 2> /dev/null; then
  echo "tests: left out, pytest is not installed"
  printf 'tests\tleft-out\t0\t0\n' >> "$work/status"
elif [ ${#small[@]} -gt 0 ]; then
  TRITON_INTERPRET=1 step tests 100 "$python" -m pytest -q -p no:cacheprovider -k packed tests/unit/kernels/test_kernel_embedding.py
else
  several=()
  if "$python" -c 'import xdist' 2> /dev/null; then several=(-n 4); fi
  # shellcheck disable=SC2046
  step tests 90 "$python" -m pytest -q -p no:cacheprovider ${several[@]+"${several[@]}"} -m gpu $(grep -rl --include='test_*.py' 'mark\.gpu' tests)
fi
measure steps 180 30
measure graph 40 20
measure lists 50 0
measure kernels 60 25
measure beam 60 0
measure latency 30 0
# Nothing is measured here, so it may run past the deadline.
deadline=$((SECONDS + 10 * factor))
step summary 10 "$python" -m genrec_dist.bench.gpu.check summary --out "$out" --status "$work/status" --logs "$work"
tail -n 1 "$work/summary.log"
exit "$failed"
