#!/usr/bin/env bash
# The language-model tables of RESULTS.md: methods in the demo's world, seed after seed.
#
#   bash bench/demo.sh spa 1 2 3        SPA, which the other arms share π_0 and data with
#   bash bench/demo.sh rays 1 2 3       π_init + c (π_0 − π_init), without any round; one of them at
#                                       the KL of SPA's last round; RAYS='2 8' gives the others' c
#   … worst                             the worst case, ε = 0.01
#   … replay, repeat                    gold pairs in every round; its control: as many of its own
#   … judge                             the rounds' labels by the gold judge
#   … every                             DPO on the gold labels of all 224 prompts
#   … flip_ARM                          any of them from a seed with 25 % of its labels wrong
#   python bench/demo_measures.py runs/table/*/*    KL to π_init, and fluency
#   python bench/demo_table.py runs/table           mean over seeds, paired differences
#   python bench/demo_plots.py runs/table           score against √KL
#
# Two seeds side by side, a thread each (OMP_NUM_THREADS=1), take seven minutes, an arm that shares
# their beginnings three to eight; on CPUs without AVX-512 three times that. Resumable: what is
# complete is skipped. Arms share what they have in common by hard links (GNU cp).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo "${PYTHON:-python3}")
init=models/smollm2
of_demo() {  # NAME: a setting of the demo
  sed -n "s/^$1=//p" configs/demo.env
}

share() {  # FROM TO PATHS…: a run that starts with finished pieces of another
  local from=$1 to=$2 piece path
  for piece in "${@:3}"; do
    for path in "$from/$piece" "$from/$piece.stats.json"; do
      [[ -e $path && ! -e $to/${path#"$from/"} ]] || continue
      mkdir -p "$(dirname "$to/${path#"$from/"}")"
      cp -al "$path" "$to/${path#"$from/"}"
    done
  done
}
gold=(gold/responses.jsonl gold/pairs.jsonl eval/init.jsonl)
seed=("${gold[@]}" gold/seed seed data eval/seed.jsonl)
labels=(round1/responses.jsonl round1/labelled.jsonl)

demo() {  # SETTINGS…: a run of run.sh
  bash run.sh configs/demo.env SEED="$number" RUN="$run" "${flip[@]}" "$@"
}
sample() {  # MODEL PROMPTS OUT FLAGS…
  "$python" generate.py --model "$1" --prompts "$2" --out "$3" \
    --max-new-tokens "$(of_demo MAX_NEW_TOKENS)" --seed "$number" "${@:4}"
}
answer() {  # NAME=MODEL: of the evaluation, as run.sh does
  sample "${1#*=}" "$spa/data/eval.jsonl" "$run/eval/${1%%=*}.jsonl" -n "$(of_demo EVAL_N)"
}
evaluate() {  # NAME=MODEL…
  local one answers=()
  for one in "$@"; do
    answer "$one"
    answers+=("${one%%=*}=$run/eval/${one%%=*}.jsonl")
  done
  "$python" evaluate.py --answers "${answers[@]}" --judge vader --out "$run"
}
repeats() {  # run.sh has no setting for it: SPA, with as many of a round's own pairs again as gold
  local policy=$spa/seed t round rows
  share "$spa" "$run" eval/init.jsonl eval/seed.jsonl "${labels[@]}"
  for t in 1 2; do
    round=$run/round$t
    rows=$round/labelled.jsonl
    sample "$policy" "$spa/data/prompts_$t.jsonl" "$round/responses.jsonl" -n "$(of_demo N)"
    "$python" label.py --model "$policy" --reference-model $init --out "$rows" \
      --responses "$round/responses.jsonl"
    awk -v more="$(of_demo SEED_SIZE)" '{ print; row[NR] = $0 }
      END { for (k = 0; k < more; k++) { again = row[k % NR + 1]
        sub(/"id": "/, "&again " k " ", again); print again } }' "$rows" >"$round/joined.jsonl"
    "$python" dro.py --pairs "$round/joined.jsonl" --out "$round/worst.jsonl" --epsilon 0
    "$python" train.py --model "$policy" --pairs "$round/worst.jsonl" --out "$round/policy" \
      --lam "$(( t == 1 ? 50 : 25 ))e-2" --lr "$(of_demo LR)" --batch-size "$(of_demo BATCH_SIZE)" \
      --micro-tokens "$(of_demo MICRO_TOKENS)" --seed "$number"
    policy=$round/policy
  done
  evaluate init=$init seed="$spa/seed" round1="$run/round1/policy" round2="$run/round2/policy"
}
rays() {  # SCALES…: the policy of the seed stage, scaled
  local c policies=(init=$init seed="$spa/seed")
  share "$spa" "$run" eval/init.jsonl eval/seed.jsonl
  for c in "$@"; do
    ray "$c" "ray$c"
    answer "ray$c=$run/ray$c"
    policies+=("ray$c=$run/ray$c")
  done
  "$python" bench/demo_measures.py "$spa" "$run"
  c=$("$python" bench/demo_measures.py "$run" --match "$spa")
  ray "$c" match
  evaluate "${policies[@]}" match="$run/match"
}
ray() {  # SCALE NAME
  "$python" bench/extrapolate.py --model "$spa/seed" --reference-model $init --scale "$1" \
    --out "$run/$2"
}

if (( $# < 2 )); then
  echo "error: name an arm, and seeds; sed -n '4,16p' bench/demo.sh lists the arms" >&2
  exit 2
fi
for number in "${@:2}"; do
  base=runs/table/$number
  run=$base/$1
  arm=${1#flip_}
  spa=$base/${1%"$arm"}spa
  flip=()
  [[ $arm == "$1" ]] || flip=(FLIP=0.25)
  case $arm in
    spa)
      [[ $run == "$base/spa" ]] || share "$base/spa" "$run" "${gold[@]}"
      demo METHOD=spa ;;
    worst)
      share "$spa" "$run" "${seed[@]}" "${labels[@]}"
      demo ;;
    judge)
      share "$spa" "$run" "${seed[@]}" round1/responses.jsonl
      demo METHOD=spa JUDGE=vader ;;
    every)
      share "$spa" "$run" eval/init.jsonl
      demo METHOD=spa SEED_SIZE=224 ROUNDS= ;;
    rays) rays ${RAYS:-2 4 6} ;;
    replay)
      share "$spa" "$run" "${seed[@]}" round1/responses.jsonl
      demo METHOD=spa REPLAY=yes ;;
    repeat) repeats ;;
    *)
      echo "error: $arm: no arm; sed -n '4,16p' bench/demo.sh lists them" >&2
      exit 2 ;;
  esac
done
