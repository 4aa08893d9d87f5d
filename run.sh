#!/usr/bin/env bash
# Adversarial preference optimisation: seed → T × (generate, label, dro, train) → evaluate.
#
#   bash run.sh                        configs/demo.env: a small model, two CPU cores → runs/demo
#   bash run.sh configs/NAME.env       another setting: what differs from the papers' values
#   bash run.sh [CONFIG] NAME=VALUE …  settings by hand; DATA without CONFIG: a 7 B model's defaults
#   bash run.sh METHOD=spa             SPA; with ALPHA=0 as well, iterative DPO on self-labels
#   bash run.sh … --tiny               a tiny model, few rows, RUN-tiny: would the launch work?
#   bash run.sh … --check              can it run, and what would it do?
#   bash run.sh test                   the tests
#   bash run.sh --help                 every setting, its default and its meaning
#
# What is complete, from the same settings, is skipped: the same command goes on after a stop.

set -euo pipefail
[[ $0 -ef run.sh ]] || { echo "error: call it where it lies: cd '$(dirname "$0")'" >&2; exit 2; }
# Settings, the interpreter, and `stage`: on all processes, but data and dro.py on one.
source configs/settings.sh "$@"

algorithm() {  # runs twice: in the first pass every stage only looks, in the second it works
  local init=$MODEL policy=${SEED_POLICY:-$RUN/seed} gold=$RUN/data/seed.jsonl judge=$JUDGE_MODEL
  local reference t round name from anchor=init replay=''
  local rounds=($ROUNDS) lams=($LAMS) policies=(start="$policy") labels=() answers=()

  [[ $METHOD != spa ]] || anchor=previous  # D6a
  local split=(--seed-size "$SEED_SIZE")
  [[ -z $SEED_FRACTION ]] || split=(--seed-fraction "$SEED_FRACTION")
  [[ -z $SEED_POLICY ]] || split=(--seed-size 0)
  local train=(--beta "$BETA" --batch-size "$BATCH_SIZE" --seed "$SEED" --precision "$PRECISION"
    --micro-tokens "$MICRO_TOKENS")
  [[ $SHARD == no ]] || train+=(--gradient-checkpointing --shard)
  local sample=(--max-new-tokens "$MAX_NEW_TOKENS" --seed "$SEED" --precision "$PRECISION"
    --sample-tokens "$SAMPLE_TOKENS" --backend "$BACKEND")
  local ask=(--judge-tokens "$JUDGE_TOKENS" ${BASE_URL:+--base-url "$BASE_URL"}
    --precision "$PRECISION")
  local gold_judge=(--judge "$GOLD" ${GOLD_MODEL:+--judge-model "$GOLD_MODEL"} "${ask[@]}")

  # 0. The model, and the data: a gold seed, unlabelled prompts for each round, and for evaluation.
  [[ -z $tiny ]] || stage -m data.tiny --architecture "$ARCHITECTURE" --out "$RUN/tiny"
  [[ $MODEL != models/smollm2 ]] || stage -m data.demo --out "$MODEL"
  if [[ $SYSTEM_TURN == empty ]]; then  # it goes into the template, which all policies inherit
    init=$RUN/init
    stage -m data.system_turn --model "$MODEL" --out "$init"
  fi
  [[ $PROMPTS_ALONE == no ]] || split+=(--prompts-alone)
  [[ $JUDGE != llm ]] || split+=(--judge-model "${judge:-$init}")  # prompt and two answers must fit
  stage -m data.prepare --data "$DATA" --out "$RUN/data" "${split[@]}" --select "$SELECT" \
    --rounds $ROUNDS --eval-size "$EVAL_SIZE" --model "${SEED_POLICY:-$init}" \
    --max-new-tokens "$MAX_NEW_TOKENS" --flip "$FLIP" --seed "$SEED"

  # Prompts without preferences: the model answers, the gold judge labels; FLIP of them are turned.
  if [[ $PROMPTS_ALONE == yes && -z $SEED_POLICY ]]; then
    stage generate.py --model "$init" --prompts "$RUN/data/seed.jsonl" \
      --out "$RUN/gold/responses.jsonl" -n "$N" --temperature "$TEMPERATURE" "${sample[@]}"
    stage label.py --responses "$RUN/gold/responses.jsonl" --out "$RUN/gold/pairs.jsonl" \
      "${gold_judge[@]}"
    stage -m data.prepare --data "$RUN/gold/pairs.jsonl" --out "$RUN/gold/seed" --flip "$FLIP" \
      --seed "$SEED" --seed-fraction 1 --rounds
    gold=$RUN/gold/seed/seed.jsonl
  fi

  # 1. Seed: π_0 ← DPO(π_init, gold).
  if [[ -z $SEED_POLICY ]]; then
    policies=(init="$init" seed="$policy")
    stage seed_dpo.py --model "$init" --pairs "$gold" --out "$policy" --epochs "$SEED_EPOCHS" \
      --lr "$LR" "${train[@]}"
  fi

  # 2. Rounds: π_{t−1} answers and judges; the follower finds the worst case; π_t learns under it.
  reference=$init
  [[ $REPLAY == no ]] || replay=$gold
  for t in $(seq "${#rounds[@]}"); do
    round=$RUN/round$t
    # y_1 … y_n ~ π_{t−1}(· | x)
    stage generate.py --model "$policy" --prompts "$RUN/data/prompts_$t.jsonl" \
      --out "$round/responses.jsonl" -n "$N" --temperature "$TEMPERATURE" "${sample[@]}"
    # an LLM judge that is not given learns the letters of the gold pairs
    if [[ $JUDGE == llm && -z $JUDGE_MODEL && ( $t == 1 || $JUDGE_START == previous ) ]]; then
      judge=$RUN/judge from=$init
      [[ $JUDGE_START == init ]] || judge=$round/judge from=$policy
      stage seed_dpo.py --objective judge --model "$from" --pairs "$gold" --out "$judge" \
        --lr "$JUDGE_LR" "${train[@]}"
    fi
    # r(y) = β(log π_{t−1} − log π_init); best against worst becomes a pair                  S7, S8
    stage label.py --model "$policy" --responses "$round/responses.jsonl" \
      --out "$round/labelled.jsonl" --judge "$JUDGE" ${judge:+--judge-model "$judge"} \
      --reference "$REFERENCE" --reference-model "$reference" --beta "$BETA" \
      --length-penalty "$LENGTH_PENALTY" ${replay:+--gold "$replay"} "${ask[@]}"
    # the worst distribution of the confidences within W₁ ≤ ε                           T2-2 … T2-5
    stage dro.py --pairs "$round/labelled.jsonl" --out "$round/worst.jsonl" \
      --epsilon "$EPSILON" --pieces "$PIECES" ${GROUP:+--group "$GROUP"}
    # π_t: noise-refined labels under that worst case                                      S9 … S12
    stage train.py --model "$policy" --pairs "$round/worst.jsonl" --out "$round/policy" \
      --anchor "$anchor" --alpha "$ALPHA" --lam "${lams[t - 1]:-${lams[@]: -1}}" \
      --percentile "$PERCENTILE" --lr "$LR" "${train[@]}"
    [[ $REFERENCE != previous ]] || reference=$policy
    policy=$round/policy
    policies+=(round$t="$policy")
    labels+=(round$t="$round/worst.jsonl")
  done

  # 3. Evaluate: every policy answers prompts that nothing was trained on.
  for name in "${policies[@]}"; do
    stage generate.py --model "${name#*=}" --prompts "$RUN/data/eval.jsonl" \
      --out "$RUN/eval/${name%%=*}.jsonl" -n "$EVAL_N" --temperature 0.7 "${sample[@]}"
    answers+=("${name%%=*}=$RUN/eval/${name%%=*}.jsonl")
  done
  stage evaluate.py --answers "${answers[@]}" --labels "${labels[@]}" --out "$RUN" \
    "${gold_judge[@]}"
}

look_then_work
