#!/usr/bin/env bash
# Speed on one GPU, in eight minutes at most: a random model of 1 B parameters is scored and trained
# and samples, beside TRL and model.generate; then the demo runs from its first stage to its report.
#
#   bash bench/gpu.sh > gpu.jsonl    a line of JSON for every measurement, as soon as it is made
#   bash bench/gpu.sh --tiny         the same on a tiny model, on a CPU too: does it work?
#
# Pairs of 512 + 512 tokens, 32 a step, in bf16 (bench/train.py; TRL where it is installed); 256
# prompts with two answers of 300 tokens each (bench/generate.py). The demo takes models/smollm2, or
# makes it from a package index. After its measurements every program has a line with its seconds
# from start to end and its exit status; 124: the eight minutes were over.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
limit=480
size=
pairs=(--length 512 --batch-size 32 --micro-tokens 8192)
prompts=(--prompts 256 --length 300 --batch-size 256)
demo=()
if [[ ${1-} == --tiny ]]; then
  limit=7200
  size=", layers=2, width=256, vocabulary=512"
  pairs=(--length 24 --batch-size 8)
  prompts=(--prompts 4 --length 8)
  demo=(--tiny ROUNDS=1)
fi

mkdir -p runs
work=$(mktemp -d "$PWD/runs/gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
# TRL would split its batch over all cards; the allocator is the one that stages take.
cards=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${cards%%,*} PYTHON=$python TMPDIR=$work
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

failed=0
measure() {  # NAME COMMAND…: its JSON; what else it prints goes to stderr
  local began=$SECONDS status=124
  if (( began < limit )); then
    status=0
    timeout --foreground $((limit - began)) "${@:2}" |
      awk '/^{"/ { print; fflush(); next } { print > "/dev/stderr" }' || status=$?
  fi
  (( status == 0 )) || failed=1
  echo "{\"name\": \"$1, whole program\", \"seconds\": $((SECONDS - began)), \"status\": $status}"
}
training() {  # LINES of bench/train.py…
  local line
  for line; do measure "$line" "${train[@]}" --line "$line"; done
}
train=("$python" bench/train.py --model "$work/model" --pairs "$work/pairs.jsonl" "${pairs[@]}")
sample=("$python" bench/generate.py --model "$work/model" "${prompts[@]}")
trl=("TRL as shipped (gradient checkpointing)" "TRL, reference precomputed, allocator tuned")
"$python" -c "import trl" 2>/dev/null || trl=()

measure "model" "$python" -c "import bench.train; bench.train.make_model('$work/model'$size)"
measure "scoring" "${train[@]}"
training "ours" "ours, noise detection" "ours, gradient checkpointing" "${trl[@]::1}"
measure "sampling, ours" "${sample[@]}" --only ours
measure "sampling, plain" "${sample[@]}" --only plain
measure "demo" bash run.sh configs/demo.env RUN="$work/demo" "${demo[@]}"
training "${trl[@]:1}"
exit $failed
