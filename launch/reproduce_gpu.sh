#!/usr/bin/env bash
# `genrec reproduce` at full size on one GPU, in slices of 8 minutes that resume from each other, 25 minutes in all and without a
# network: launch/reproduce_gpu.sh [--cpu] SET FILE OUT [OPTION...]
#          launch/reproduce_gpu.sh [--cpu] llama BACKBONE ITEMS SET FILE OUT [OPTION...]
# Recipes best and paper-base, both protocols, one seed; OPTIONs go to genrec reproduce and may say otherwise. Called again it goes on.
# llama: a causal language model that reads titles, as it is and trained by adapters. BACKBONE is its directory, ITEMS the table with
# the titles. The lists of all users are made in one slice: where that takes longer, give a larger SLICE_MINUTES.
# --cpu: tiny models on the CPU, to try the script.
# PYTHON: the interpreter, default python3. SLICE_MINUTES, TOTAL_MINUTES: in place of 8 and 25.
# BART's weights: --set paper-base:model.backbone=DIR; where they cannot be had, paper-base starts from scratch, and says so.
# Exit code: 0 all rows are there, 1 it failed, 2 there is no GPU, 3 the time is over and the same command goes on.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
small=()
if [ "${1:-}" = --cpu ]; then
  small=(--paper-recipe paper-tiny --set model.d_model=16 --set model.ffn=16 --set model.encoder_layers=1
    --set model.decoder_layers=1 --set tokens.vocab_size=300 --set workers=0 --set finetune.epochs=1 --set paper-tiny:pretrain.epochs=1)
  shift
fi
llama=()
if [ "${1:-}" = llama ] && [ $# -ge 6 ]; then
  llama=(--llama "$2" --items "$3")
  # The backbone has a shape of its own.
  if [ ${#small[@]} -gt 0 ]; then small=(--set workers=0 --set finetune.epochs=1); fi
  shift 3
fi
if [ $# -lt 3 ] || [ "$1" = llama ]; then
  echo "usage: launch/reproduce_gpu.sh [--cpu] [llama BACKBONE ITEMS] SET FILE OUT [OPTION...]" >&2
  exit 2
fi
name=$1 file=$2 out=$3
shift 3

export PYTHONPATH="$root:$root/kernels:$root/shards:$root/tuning${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
paper=paper-base
if [ ${#small[@]} -gt 0 ]; then
  export CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  paper=paper-tiny
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "launch/reproduce_gpu.sh: no NVIDIA GPU for $python and its torch here (PYTHON=... names another); --cpu tries the script without one" >&2
  exit 2
fi

systems="popularity,counting,knn,best,$paper,$paper-without-pretraining"
if [ ${#llama[@]} -gt 0 ]; then systems=popularity,knn,graph+text,llama-untrained,llama; fi

total=$(awk "BEGIN { print int(60 * ${TOTAL_MINUTES:-25}) }")
while :; do
  left=$((total - SECONDS))
  # A slice saves for a while after its minutes are over.
  minutes=$(awk "BEGIN { m = ($left - 45) / 60; s = ${SLICE_MINUTES:-8}; print (m < s ? (m < 0 ? 0 : m) : s) }")
  said=$(mktemp) || exit 1
  "$python" -m genrec_dist.cli reproduce "$name" --data "$file" --out "$out" --seeds 1 --minutes "$minutes" \
    --systems "$systems" ${llama[@]+"${llama[@]}"} ${small[@]+"${small[@]}"} "$@" | tee "$said"
  code=${PIPESTATUS[0]}
  over=$(grep -c "the same command goes on" "$said")
  rm -f "$said"
  if [ "$code" -ne 0 ]; then exit 1; fi
  if [ "$over" -eq 0 ]; then exit 0; fi
  if [ $((total - SECONDS)) -le 60 ]; then exit 3; fi
done
