#!/usr/bin/env bash
# Adversarial preference optimisation, end to end: seed → T × (generate, label, dro, train) → evaluate.
#
#   bash run.sh                        the demo: a real 135 M model, two CPU cores, about ten minutes     → runs/demo/report.md
#   bash run.sh configs/NAME.env       another setting; a config sets only what differs from the papers' values below
#   bash run.sh configs/NAME.env --tiny   the same with a tiny random model of its architecture and 36 pairs: would the launch work?
#   MODEL=… DATA=… bash run.sh         any causal LM and any preference data, with the papers' values
#   METHOD=spa bash run.sh             SPA;  METHOD=spa ALPHA=0 bash run.sh  iterative DPO on self-labels
#   bash run.sh test                   the tests
#
# Every variable below can be set on the command line, before a config, before the default. A stage whose complete output
# from the same settings lies there is skipped, so the same command goes on after a stop.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")"
if [[ ${1-} == @(-h|--help) ]]; then
  sed -n '2,/^$/{/^#/s/^# \?//p}' run.sh
  exit
fi

# The interpreter: the one at hand if it has what requirements.txt pins, else a .venv of our own. INSTALL=no takes it as it is.
python=${PYTHON:-python3}
satisfied() {
  "$1" - <<'END' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
lines = (line.split("#")[0].strip() for line in open("requirements.txt"))
sys.exit(any(version(r.name) not in r.specifier for r in map(Requirement, filter(None, lines))))
END
}
if [[ ${INSTALL-} != no ]] && ! satisfied "$python"; then
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  python=.venv/bin/python
  if ! satisfied "$python"; then
    echo "installing requirements.txt into .venv" >&2
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
fi

if [[ ${1-} == test ]]; then
  exec "$python" -m pytest -q "${@:2}" tests
fi

if [[ -n ${1-} || -z ${DATA-} ]]; then
  config=${1:-configs/demo.env}
  [[ -f $config ]] || { echo "error: $config: no such config file" >&2; exit 2; }
  source "$config"
fi
NPROC=${NPROC:-1} NNODES=${NNODES:-1}                       # processes (GPUs) a machine; machines, which share this folder
EACH_NODE=${EACH_NODE:-srun --nodes=$NNODES --ntasks-per-node=1} # what runs a command on every machine; with NNODES > 1
BACKEND=${BACKEND:-transformers}                            # of sampling: transformers, or vllm (all GPUs of this machine)
SHARD=${SHARD:-no}                                          # yes: weights, gradients, Adam split over all processes, layers recomputed
METHOD=${METHOD:-worst-case}                                # worst-case (SSAPO, the thesis), or spa
name=$(basename "${config:-custom.env}" .env)
[[ $METHOD == worst-case ]] || name+=-$METHOD
RUN=${RUN:-runs/$name}                                      # where everything of this run goes
SEED=${SEED:-42}                                            # data split, order, sampling
SEED_SIZE=${SEED_SIZE:-2000} ROUNDS=${ROUNDS:-8000 20000 30000}              # gold pairs; prompts of each round
SEED_FRACTION=${SEED_FRACTION-} SELECT=${SELECT:-random}    # instead of SEED_SIZE: share of all prompts; how gold is chosen: random, farthest
FLIP=${FLIP:-0}                                             # share of the gold labels turned wrong on purpose
SEED_POLICY=${SEED_POLICY-}                                 # an aligned model in the place of π_0, and no gold seed; MODEL is π_init
N=${N:-2} TEMPERATURE=${TEMPERATURE:-0.7} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-300}
BETA=${BETA:-0.1} LR=${LR:-5e-7} BATCH_SIZE=${BATCH_SIZE:-32} SEED_EPOCHS=${SEED_EPOCHS:-3}
MICRO_TOKENS=${MICRO_TOKENS:-2048}                          # tokens a training pass and process: memory, not mathematics
ALPHA=${ALPHA:-0.1} LAMS=${LAMS:-0.5 0.25 0.125} PERCENTILE=${PERCENTILE:-10} # SPA: smoothing, extrapolation by round, flagged share
if [[ $METHOD == spa ]]; then
  EPSILON=${EPSILON:-0} ANCHOR=${ANCHOR:-previous}
fi
ANCHOR=${ANCHOR:-init}                                      # what training measures confidences against: init, or previous (SPA)
EPSILON=${EPSILON:-0.01} PIECES=${PIECES:-6}                # the follower: radius, tangents of −log
JUDGE=${JUDGE:-implicit} JUDGE_MODEL=${JUDGE_MODEL-}        # who labels the rounds: implicit (SPA), reward-model, pairrm, llm, openai
JUDGE_LR=${JUDGE_LR:-2e-5} JUDGE_START=${JUDGE_START:-init} # llm without JUDGE_MODEL is trained on the seed, once or from each π_{t−1} (previous)
REFERENCE=${REFERENCE:-init} LENGTH_PENALTY=${LENGTH_PENALTY:-0} # of the implicit reward: init, previous or none (SPA, Table 7); S13
GOLD=${GOLD:-none} GOLD_MODEL=${GOLD_MODEL-}                # judge of unlabelled seeds and of the evaluation: vader, any of the above, none
EVAL_N=${EVAL_N:-1} EVAL_SIZE=${EVAL_SIZE:-805}             # answers a prompt; prompts at most (AlpacaEval has as many)

one_of() {  # NAME CHOICES…
  local name=$1 choice
  shift
  for choice in "$@"; do [[ ${!name} == "$choice" ]] && return; done
  echo "error: $name=${!name}: must be one of: $*" >&2
  exit 2
}
one_of METHOD worst-case spa
one_of BACKEND transformers vllm
one_of SHARD no yes
one_of SELECT random farthest
one_of REFERENCE init previous none
one_of ANCHOR init previous
one_of JUDGE implicit reward-model pairrm llm openai
one_of GOLD none vader reward-model pairrm llm openai
if (( NNODES > 1 )) && ! command -v ${EACH_NODE%% *} >/dev/null; then
  echo "error: ${EACH_NODE%% *}: no such command; EACH_NODE must run a command once on each of NNODES=$NNODES machines" >&2
  exit 2
fi
if [[ $JUDGE != implicit && "$EPSILON $REFERENCE $LENGTH_PENALTY" != "0 init 0" ]]; then
  echo "error: JUDGE=$JUDGE has no confidences against π_init: it goes with METHOD=spa (EPSILON=0), and without REFERENCE and LENGTH_PENALTY" >&2
  exit 2
fi
[[ ${*:2} == @(|--tiny) ]] || { echo "error: ${*:2}: the one thing that may follow a config is --tiny" >&2; exit 2; }
if [[ ${2-} == --tiny ]]; then  # the same stages on a tiny model of the same architecture
  [[ -n ${ARCHITECTURE-} ]] || { echo "error: $config: names no ARCHITECTURE for --tiny" >&2; exit 2; }
  RUN=$RUN-tiny
  "$python" -m data.tiny --architecture "$ARCHITECTURE" --out "$RUN/tiny"
  MODEL=$RUN/tiny/model DATA=$RUN/tiny/pairs.jsonl SEED_SIZE=8 ROUNDS=${ROUNDS//+([0-9])/6} MAX_NEW_TOKENS=8 BATCH_SIZE=4
  [[ -z $SEED_POLICY ]] || SEED_POLICY=$MODEL MODEL=$RUN/tiny/base
fi

launch() {  # a stage on all processes of all machines
  local torchrun=("$python" -m torch.distributed.run --nproc_per_node "$NPROC")
  if (( NNODES > 1 )); then
    $EACH_NODE "${torchrun[@]}" --nnodes "$NNODES" --rdzv_backend c10d --rdzv_id "$RANDOM" \
      --rdzv_endpoint "${MASTER_ADDR:-$(hostname)}:${MASTER_PORT:-29500}" "$@"
  elif (( NPROC > 1 )); then
    "${torchrun[@]}" --standalone "$@"
  else
    "$python" "$@"
  fi
}
sampling() {  # a stage that samples; vLLM has processes of its own
  if [[ $BACKEND == vllm ]]; then "$python" "$@" --backend vllm; else launch "$@"; fi
}
judge=(--judge "$GOLD" ${GOLD_MODEL:+--judge-model "$GOLD_MODEL"})
train=(--beta "$BETA" --lr "$LR" --batch-size "$BATCH_SIZE" --seed "$SEED" --micro-tokens "$MICRO_TOKENS")
spread=()
if [[ $SHARD == yes ]]; then
  spread+=(--gradient-checkpointing)
  (( NPROC * NNODES == 1 )) || spread+=(--shard)
fi
train+=("${spread[@]}")
sample=(--max-new-tokens "$MAX_NEW_TOKENS" --seed "$SEED")

# 0. Model and data: a gold seed, unlabelled prompts for each round, prompts for the evaluation; no prompt in two of them.
if [[ -z ${MODEL-} ]]; then
  MODEL=models/smollm2
  "$python" data/demo.py --out "$MODEL"
fi
size=(--seed-size "$SEED_SIZE")
[[ -z $SEED_FRACTION ]] || size=(--seed-fraction "$SEED_FRACTION")
[[ -z $SEED_POLICY ]] || size=(--seed-size 0)
"$python" data/prepare.py --data "$DATA" --out "$RUN/data" "${size[@]}" --select "$SELECT" --rounds $ROUNDS --eval-size "$EVAL_SIZE" \
  --model "${SEED_POLICY:-$MODEL}" --max-new-tokens "$MAX_NEW_TOKENS" --flip "$FLIP" --seed "$SEED"
gold=$RUN/data/seed.jsonl
if [[ -f $RUN/data/seed_prompts.jsonl ]]; then  # prompts without preferences: the model answers, the gold judge labels, once
  sampling generate.py --model "$MODEL" --prompts "$RUN/data/seed_prompts.jsonl" --out "$RUN/gold/responses.jsonl" \
    -n "$N" --temperature "$TEMPERATURE" "${sample[@]}"
  launch label.py "${judge[@]}" --responses "$RUN/gold/responses.jsonl" --out "$RUN/gold/pairs.jsonl"
  "$python" data/prepare.py --data "$RUN/gold/pairs.jsonl" --out "$RUN/gold/seed" --flip "$FLIP" --seed "$SEED" \
    --seed-size "$(wc -l <"$RUN/gold/pairs.jsonl")" --rounds
  gold=$RUN/gold/seed/seed.jsonl
fi

# 1. Seed: π_0 ← DPO(π_init, gold).
if [[ -n $SEED_POLICY ]]; then
  policy=$SEED_POLICY models=(start="$SEED_POLICY")
else
  policy=$RUN/seed models=(init="$MODEL" seed="$RUN/seed")
  launch seed_dpo.py --model "$MODEL" --pairs "$gold" --out "$RUN/seed" --epochs "$SEED_EPOCHS" "${train[@]}"
fi

train_judge() {  # an LLM judge from a policy and the gold seed
  "$python" -m judges.comparisons --pairs "$gold" --out "$2.pairs.jsonl"
  launch seed_dpo.py --objective supervised --model "$1" --pairs "$2.pairs.jsonl" --out "$2" --lr "$JUDGE_LR" --epochs 3 --batch-size 32 --seed "$SEED" \
    --micro-tokens "$MICRO_TOKENS" "${spread[@]}"
}
label() {  # a round's judge labels its responses
  local judge=(--reference-model "$MODEL" --length-penalty "$LENGTH_PENALTY")
  case $JUDGE-$REFERENCE in
    implicit-init) ;;
    implicit-previous) judge+=(--reference previous --reference-model "$before") ;;
    implicit-*) judge+=(--reference "$REFERENCE") ;;
    *) judge=(--judge "$JUDGE" --judge-model "$judge_model") ;;
  esac
  launch label.py --model "$policy" "${judge[@]}" --beta "$BETA" "$@"
}
judge_model=$JUDGE_MODEL
if [[ $JUDGE == llm && -z $JUDGE_MODEL && $JUDGE_START == init ]]; then
  judge_model=$RUN/judge
  train_judge "$MODEL" "$judge_model"
fi

# 2. Rounds: π_{t−1} answers fresh prompts, judges its answers, the follower finds the worst case, π_t learns under it.
before=$MODEL labels=() lams=($LAMS) t=0
for _ in $ROUNDS; do
  t=$((t + 1)) round=$RUN/round$t
  sampling generate.py --model "$policy" --prompts "$RUN/data/prompts_$t.jsonl" --out "$round/responses.jsonl" \
    -n "$N" --temperature "$TEMPERATURE" "${sample[@]}"
  if [[ $JUDGE == llm && -z $JUDGE_MODEL && $JUDGE_START == previous ]]; then
    judge_model=$round/judge
    train_judge "$policy" "$judge_model"
  fi
  label --responses "$round/responses.jsonl" --out "$round/labelled.jsonl"
  "$python" dro.py --pairs "$round/labelled.jsonl" --out "$round/worst.jsonl" --epsilon "$EPSILON" --pieces "$PIECES"
  launch train.py --model "$policy" --pairs "$round/worst.jsonl" --out "$round/policy" --alpha "$ALPHA" \
    --anchor "$ANCHOR" --lam "${lams[t - 1]:-${lams[-1]}}" --percentile "$PERCENTILE" --pieces "$PIECES" "${train[@]}"
  before=$policy policy=$round/policy models+=(round$t="$policy") labels+=(round$t="$round/worst.jsonl")
done

# 3. Evaluate: every policy of the run on prompts that nothing was trained on.
sampling evaluate.py --models "${models[@]}" --labels "${labels[@]}" --prompts "$RUN/data/eval.jsonl" --out "$RUN" "${judge[@]}" \
  -n "$EVAL_N" "${sample[@]}"
