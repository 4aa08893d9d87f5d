#!/usr/bin/env bash
# The language-model tables of RESULTS.md: methods in the demo's world, seed after seed.
#
#   bash bench/demo.sh central 1 2 3    two rounds: DPO on seed, on all gold labels, SPA, worst case
#   bash bench/demo.sh flipped 1 2 3    two rounds from a seed with 25 % of its labels wrong
#   bash bench/demo.sh causes 1 2 3     one round from shared labels: anchor, radius, random pairs;
#                                       clean and 40 % flipped
#   bash bench/demo.sh papers 1 2 3     the papers' other rows, one round
#   python bench/demo_measures.py runs/table    held-out worst case, worst prompts, right labels
#   python bench/demo_table.py runs/table       mean over seeds, paired differences
#   python bench/demo_plots.py runs/table       gold score by stage; both defences on one axis
#
# On two quiet cores an arm of one round takes about two minutes, a whole two-round run seven.
# Resumable: what is complete is skipped. Arms share what they have in common (gold pairs, π_0,
# candidates, labels) by hard links (GNU cp).
set -euo pipefail
cd "$(dirname "$0")/.."
table=${1:?central, flipped, causes or papers}
shift

share() {  # FROM TO PATHS…: a run that starts with finished pieces of another
  local from=$1 to=$2 piece path
  shift 2
  for piece in "$@"; do
    for path in "$from/$piece" "$from/$piece.stats.json"; do
      [[ -e $path && ! -e $to/${path#"$from/"} ]] || continue
      mkdir -p "$(dirname "$to/${path#"$from/"}")"
      cp -al "$path" "$to/${path#"$from/"}"
    done
  done
}
gold=(gold/responses.jsonl gold/pairs.jsonl)
seed=("${gold[@]}" gold/seed seed)
eval=(data eval/init.jsonl eval/seed.jsonl)
labels=(round1/responses.jsonl round1/labelled.jsonl)

for SEED in "$@"; do
  export SEED
  base=runs/table/$SEED
  case $table in
    central)
      RUN=$base/worst bash run.sh
      share "$base/worst" "$base/spa" "${seed[@]}" "${eval[@]}" "${labels[@]}"
      METHOD=spa RUN=$base/spa bash run.sh
      share "$base/worst" "$base/gold" eval/init.jsonl
      ROUNDS=none SEED_SIZE=232 RUN=$base/gold bash run.sh
      ;;
    flipped)
      share "$base/worst" "$base/flip_worst" "${gold[@]}" eval/init.jsonl
      FLIP=0.25 RUN=$base/flip_worst bash run.sh
      share "$base/flip_worst" "$base/flip_spa" "${seed[@]}" "${eval[@]}" "${labels[@]}"
      FLIP=0.25 METHOD=spa RUN=$base/flip_spa bash run.sh
      ;;
    causes)
      export ROUNDS=96 EVAL_SIZE=128
      for FLIP in 0 0.4; do
        export FLIP
        first=$base/one_spa_$FLIP
        share "$base/worst" "$first" "${gold[@]}"
        METHOD=spa RUN=$first bash run.sh
        for EPSILON in 0 0.01 0.05; do
          arm=$base/one_init_${EPSILON}_$FLIP
          share "$first" "$arm" "${seed[@]}" "${eval[@]}" "${labels[@]}"
          EPSILON=$EPSILON RUN=$arm bash run.sh
        done
        # the same moved fractions on random pairs: the follower's file alone is exchanged
        random=$base/one_random_0.05_$FLIP
        share "$arm" "$random" "${seed[@]}" "${eval[@]}" "${labels[@]}" round1/worst.jsonl
        python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo "${PYTHON:-python3}")
        "$python" bench/random_pairs.py --seed "$SEED" \
          --pairs "$arm/round1/worst.jsonl" --out "$random/round1/worst.jsonl"
        EPSILON=0.05 RUN=$random bash run.sh
      done
      ;;
    papers)
      export ROUNDS=96 EVAL_SIZE=128 METHOD=spa
      first=$base/one_spa_0
      share "$base/worst" "$first" "${gold[@]}"
      RUN=$first bash run.sh
      for arm in iterdpo no_dnd two none vader llm; do
        share "$first" "$base/one_$arm" "${seed[@]}" "${eval[@]}" round1/responses.jsonl
      done
      for arm in iterdpo no_dnd; do
        share "$first" "$base/one_$arm" round1/labelled.jsonl
      done
      ALPHA=0 RUN=$base/one_iterdpo bash run.sh
      LAMS=0 RUN=$base/one_no_dnd bash run.sh
      N=2 GOLD_N=4 REDO=yes RUN=$base/one_two bash run.sh
      REFERENCE=none RUN=$base/one_none bash run.sh
      ALPHA=0 JUDGE=vader RUN=$base/one_vader bash run.sh
      ALPHA=0 JUDGE=llm RUN=$base/one_llm bash run.sh
      SEED_SIZE=10 RUN=$base/one_seed10 bash run.sh
      SEED_SIZE=20 RUN=$base/one_seed20 bash run.sh
      ;;
    *)
      echo "error: $table: central, flipped, causes or papers" >&2
      exit 2
      ;;
  esac
done
