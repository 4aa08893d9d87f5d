#!/usr/bin/env bash
# The table of RESULTS.md: five methods on the demo's world, on clean gold labels and with 25 % of them flipped.
#
#   bash bench/demo.sh 1 2 3 4 5           one seed after the other, about 20 minutes each on two cores
#   python bench/demo_table.py runs/table  mean ± standard error over the seeds
#
# Methods share what they have in common (gold pairs, π_0, the candidates and labels of round 1) by hard links (GNU cp).
set -euo pipefail
cd "$(dirname "$0")/.."

variant() {  # variant FROM TO PATHS…: a new run that starts with finished pieces of another
  local from=$1 to=$2 piece
  shift 2
  for piece in "$@"; do
    for path in "$from/$piece" "$from/$piece.stats.json"; do
      [[ ! -e $path || -e $to/${path#"$from/"} ]] && continue
      mkdir -p "$(dirname "$to/${path#"$from/"}")"
      cp -al "$path" "$to/${path#"$from/"}"
    done
  done
}
data=(data gold/responses.jsonl gold/pairs.jsonl eval/init.jsonl)
start=("${data[@]}" gold/seed seed eval/seed.jsonl round1/responses.jsonl round1/labelled.jsonl)

for SEED in "$@"; do
  export SEED
  base=runs/table/$SEED
  RUN=$base/worst bash run.sh
  variant "$base/worst" "$base/spa" "${start[@]}"
  RUN=$base/spa EPSILON=0 bash run.sh
  variant "$base/worst" "$base/iterdpo" "${start[@]}"
  RUN=$base/iterdpo EPSILON=0 ALPHA=0 bash run.sh
done
for SEED in "$@"; do
  export SEED FLIP=0.25
  base=runs/table/$SEED
  variant "$base/worst" "$base/flip_worst" "${data[@]}"
  RUN=$base/flip_worst bash run.sh
  variant "$base/flip_worst" "$base/flip_spa" "${start[@]}"
  RUN=$base/flip_spa EPSILON=0 bash run.sh
done
