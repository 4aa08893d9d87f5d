#!/usr/bin/env bash
# Adversarial preference optimisation: seed → T × (generate, label, dro, train) → evaluate.
#
#   bash run.sh                           the demo: a 135 M model on two cores → runs/demo/report.md
#   bash run.sh configs/NAME.env          another setting: what differs from the papers' values
#   bash run.sh configs/NAME.env --tiny   on a tiny random model of its kind: would the launch work?
#   MODEL=… DATA=… bash run.sh            any causal LM and preference data, with the papers' values
#   METHOD=spa bash run.sh                SPA; with ALPHA=0 iterative DPO on self-labels
#   bash run.sh … --check                 can it run, and what would it do?
#   bash run.sh test                      the tests
#   bash run.sh --help                    every variable, its default and its meaning
#
# What is complete, from the same settings, is skipped: the same command goes on after a stop.

set -euo pipefail
caller=$PWD
cd "$(dirname "$0")"
# Settings, checks, installation; and the flags that calls share: `size`, `sample`, `train`,
# `endpoint`, `gold_judge`. `single` starts a stage on one process, `launch` and `sampling` on all.
# For the checks this script first runs once with listing=yes, where they only print their calls.
source configs/defaults.sh

# 0. Data: a gold seed, unlabelled prompts for each round, prompts for the evaluation.
single -m data.prepare --data "$DATA" --out "$RUN/data" "${size[@]}" --select "$SELECT" \
  --rounds $ROUNDS --eval-size "$EVAL_SIZE" --model "${SEED_POLICY:-$MODEL}" \
  --max-new-tokens "$MAX_NEW_TOKENS" --flip "$FLIP" --seed "$SEED"
gold=$RUN/data/seed.jsonl

# Prompts without preferences: the model answers, the gold judge labels, once.
if prompts_alone; then
  sampling generate.py --model "$MODEL" --prompts "$RUN/data/seed_prompts.jsonl" \
    --out "$RUN/gold/responses.jsonl" -n "$GOLD_N" --temperature "$TEMPERATURE" "${sample[@]}"
  launch label.py --responses "$RUN/gold/responses.jsonl" --out "$RUN/gold/pairs.jsonl" \
    --judge "$GOLD" "${gold_judge[@]}"
  single -m data.prepare --data "$RUN/gold/pairs.jsonl" --out "$RUN/gold/seed" \
    --flip "$FLIP" --seed "$SEED" --seed-fraction 1 --rounds
  gold=$RUN/gold/seed/seed.jsonl
fi

# 1. Seed: π_0 ← DPO(π_init, gold).
if [[ -n $SEED_POLICY ]]; then
  policy=$SEED_POLICY
  models=(start="$SEED_POLICY")
else
  policy=$RUN/seed
  models=(init="$MODEL" seed="$RUN/seed")
  launch seed_dpo.py --model "$MODEL" --pairs "$gold" --out "$RUN/seed" \
    --epochs "$SEED_EPOCHS" --lr "$LR" "${train[@]}"
fi

# An LLM judge, where one is asked for and none is given, learns the letters of the gold pairs.
train_judge() {  # FROM OUT
  single -m judges.comparisons --pairs "$gold" --out "$2.pairs.jsonl"
  launch seed_dpo.py --objective supervised --model "$1" --pairs "$2.pairs.jsonl" --out "$2" \
    --lr "$JUDGE_LR" "${train[@]}"
}
judge_model=$JUDGE_MODEL
if [[ $JUDGE-$JUDGE_START == llm-init && -z $JUDGE_MODEL ]]; then
  judge_model=$RUN/judge
  train_judge "$MODEL" "$judge_model"
fi

# 2. Rounds: π_{t−1} answers and judges; the follower finds the worst case; π_t learns under it.
before=$MODEL labels=() lams=($LAMS) t=0
for _ in $ROUNDS; do
  t=$((t + 1))
  round=$RUN/round$t
  # y_1 … y_n ~ π_{t−1}(· | x)
  sampling generate.py --model "$policy" --prompts "$RUN/data/prompts_$t.jsonl" \
    --out "$round/responses.jsonl" -n "$N" --temperature "$TEMPERATURE" "${sample[@]}"
  if [[ $JUDGE-$JUDGE_START == llm-previous && -z $JUDGE_MODEL ]]; then
    judge_model=$round/judge
    train_judge "$policy" "$judge_model"
  fi
  # r(y) = β(log π_{t−1} − log π_init); best against worst becomes a pair                    S7, S8
  reference=$MODEL
  [[ $REFERENCE != previous ]] || reference=$before
  launch label.py --model "$policy" --responses "$round/responses.jsonl" \
    --out "$round/labelled.jsonl" --judge "$JUDGE" ${judge_model:+--judge-model "$judge_model"} \
    "${endpoint[@]}" --reference "$REFERENCE" --reference-model "$reference" --beta "$BETA" \
    --length-penalty "$LENGTH_PENALTY"
  # the worst distribution of the confidences within W₁ ≤ ε                             T2-2 … T2-5
  single dro.py --pairs "$round/labelled.jsonl" --out "$round/worst.jsonl" \
    --epsilon "$EPSILON" --pieces "$PIECES" ${GROUP:+--group "$GROUP"}
  # π_t: noise-refined labels under that worst case                                        S9 … S12
  launch train.py --model "$policy" --pairs "$round/worst.jsonl" --out "$round/policy" \
    --anchor "$ANCHOR" --alpha "$ALPHA" --lam "${lams[t - 1]:-${lams[-1]}}" \
    --percentile "$PERCENTILE" --lr "$LR" "${train[@]}"
  before=$policy policy=$round/policy
  models+=(round$t="$policy")
  labels+=(round$t="$round/worst.jsonl")
done

# 3. Evaluate: every policy of the run on prompts that nothing was trained on.
sampling evaluate.py --models "${models[@]}" --labels "${labels[@]}" --out "$RUN" \
  --prompts "$RUN/data/eval.jsonl" --judge "$GOLD" "${gold_judge[@]}" -n "$EVAL_N" "${sample[@]}"
