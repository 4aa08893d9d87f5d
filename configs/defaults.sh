# What run.sh needs before its first stage: settings with their defaults and checks, the
# interpreter, how a stage starts.
# Sourced by run.sh, from the project's folder; $caller is the folder that run.sh was called from.

stop() {
  echo "error: $*" >&2
  exit 2
}

# ----------------------------------------------------------------------------------------- settings

settings=()
meanings=()
setting() {  # NAME DEFAULT MEANING: a variable keeps what the command line or a config gave it
  settings+=("$1")
  meanings+=("$2|$3")
  [[ -n ${!1-} ]] || printf -v "$1" %s "$2"
}
spa_or() {  # VALUE_FOR_SPA OTHERWISE
  if [[ ${METHOD-} == spa ]]; then echo "$1"; else echo "$2"; fi
}

define_settings() {
  setting METHOD worst-case "worst-case (SSAPO, the thesis) or spa"
  setting MODEL "" \
    "π_init: a Hugging Face folder or hub id; empty: the demo's SmolLM2-135M-Instruct"
  setting SYSTEM_TURN none \
    "empty: MODEL was tuned with an empty system turn where a conversation has none"
  setting DATA "" "preferences, or prompts alone: JSONL, or whatever \`datasets\` loads"
  setting RUN "" \
    "folder of this run; empty: runs/ and a name made of config or model, data and method"
  setting SEED 42 "decides data split, order and sampling"

  setting SEED_SIZE 2000 "gold pairs"
  setting SEED_FRACTION "" "gold pairs as a share of all prompts, in the place of SEED_SIZE"
  setting SELECT random "how gold prompts are chosen: random, or farthest (those that differ most)"
  setting FLIP 0 "share of the gold labels turned wrong on purpose"
  setting ROUNDS "8000 20000 30000" "prompts of each round; none: the seed stage alone"
  setting SEED_POLICY "" "an aligned model in the place of π_0, and no gold seed; MODEL is π_init"
  setting GOLD none \
    "judges unlabelled seeds and the evaluation: none, vader, reward-model, pairrm, llm, openai"
  setting GOLD_MODEL "" "that judge's model"

  setting N 2 "responses a prompt; the best and the worst become a pair"
  setting GOLD_N "$N" "responses a prompt of a seed that the gold judge labels"
  setting TEMPERATURE 0.7 "of the rounds' answers; the evaluation samples at 0.7"
  setting MAX_NEW_TOKENS 300 "length limit of a response"

  setting BETA 0.1 "weight of the KL term, and scale of the implicit reward"
  setting LR 5e-7 "peak learning rate"
  setting BATCH_SIZE 32 "pairs an update"
  setting SEED_EPOCHS 3 "passes over the gold pairs"
  setting ALPHA 0.1 "SPA: label smoothing of flagged pairs; 0: no refinement"
  setting LAMS "0.5 0.25 0.125" "SPA: extrapolation, round by round"
  setting PERCENTILE 10 "SPA: share of the pairs to flag, in percent"
  setting ANCHOR "$(spa_or previous init)" \
    "what training measures confidences against: init, or previous (SPA's own)"
  setting EPSILON "$(spa_or 0 0.01)" "the follower's radius; 0: no worst case"
  setting PIECES 6 "tangents of −log ξ"
  setting GROUP "" "pairs a group of the follower (the thesis: 100); empty: all in one"

  setting JUDGE implicit \
    "who labels the rounds: implicit (SPA), vader, reward-model, pairrm, llm, openai"
  setting JUDGE_MODEL "" "that judge's model; llm without one is trained on the gold seed"
  setting BASE_URL "" "endpoint of JUDGE=openai and GOLD=openai; empty: OpenAI's own"
  setting JUDGE_TOKENS 16 "room for an answer of that endpoint; more where it reasons first"
  setting JUDGE_LR 2e-5 "learning rate at which JUDGE=llm is trained on the seed"
  setting JUDGE_START init \
    "when it is: once, from π_init (init), or in each round anew, from π_{t−1} (previous)"
  setting REFERENCE init "of the implicit reward: init, previous, none (SPA, Table 7)"
  setting LENGTH_PENALTY 0 "taken off the implicit reward, a token (S13)"

  setting EVAL_SIZE 805 "prompts of the evaluation, at most"
  setting EVAL_N 1 "answers a prompt"

  setting NPROC 1 "processes (GPUs) a machine"
  setting NNODES 1 "machines, which share this folder"
  # one task a machine would be bound to one core and given its share of the memory
  local slurm="srun --nodes=${NNODES:-1} --ntasks-per-node=1 --cpu-bind=none --mem=0 --export=ALL"
  setting EACH_NODE "$slurm" \
    "runs a command once on every machine (MPI: mpirun --map-by ppr:1:node --bind-to none -x PATH)"
  setting MASTER_ADDR "" "host where the machines meet; empty: the first that EACH_NODE reaches"
  setting MASTER_PORT 29500 "port there"
  setting BACKEND transformers "of sampling: transformers, or vllm (all GPUs of this machine)"
  setting SAMPLE_TOKENS 131072 "tokens sampled together, prompts and answers: memory, not text"
  setting SHARD no \
    "yes: weights, gradients and Adam are split over all processes, layers recomputed"
  setting MICRO_TOKENS 2048 "tokens a training pass and process: memory, not mathematics"
  setting REDO no \
    "yes: replace complete stages whose settings have changed; else the run stops at the first"
  setting PYTHON python3 \
    "the interpreter; a .venv is made where it lacks what requirements.txt asks for"
  setting INSTALL yes "no: take PYTHON as it is"
}

usage() {
  sed -n '2,/^$/{/^#/s/^# \?//p}' run.sh
  echo "The command line gives a variable its value, else the config, else its default. A config"
  echo 'leaves the command line its say by : "${LR:=1e-5}"; a plain LR=1e-5 is the last word.'
  define_settings
  local i
  for i in "${!settings[@]}"; do
    printf '  %-15s %s\n' "${settings[i]}" "${meanings[i]#*|}"
    [[ -z ${meanings[i]%%|*} ]] || printf '  %-15s default: %s\n' "" "${meanings[i]%%|*}"
  done
}

# ------------------------------------------------------------------------------------------- checks

one_of() {  # NAME CHOICES…
  local name=$1 choice
  shift
  for choice in "$@"; do
    [[ ${!name} == "$choice" ]] && return
  done
  stop "$name=${!name}: must be one of: $*"
}

whole_number() {  # NAME: must be one, at least 1
  [[ ${!1} == +([0-9]) && ${!1} != +(0) ]] || stop "$1=${!1}: must be a whole number, at least 1"
}

near_names() {  # stops at a variable that is one slip of the finger away from a setting
  local name setting i head tail rest
  for name in $(compgen -e); do
    [[ " ${settings[*]} " != *" $name "* ]] || continue
    for setting in "${settings[@]}"; do
      (( ${#setting} >= 4 )) || continue
      (( ${#setting} - ${#name} <= 1 && ${#name} - ${#setting} <= 1 )) || continue
      for (( i = 0; i <= ${#setting}; i++ )); do
        head=${setting:0:i} tail=${setting:i} rest=${setting:i+1}
        # a letter more, another letter, a letter less, two exchanged; without quotes, because an
        # empty pair of them behind ? matches nothing
        case $name in
          $head?$tail | $head?$rest | $head$rest | $head${rest:0:1}${tail:0:1}${rest:1})
            stop "$name is no setting; is $setting meant?"
            ;;
        esac
      done
    done
  done
}

check_settings() {
  near_names
  one_of METHOD worst-case spa
  one_of SYSTEM_TURN none empty
  one_of ANCHOR init previous
  one_of BACKEND transformers vllm
  one_of SHARD no yes
  one_of REDO no yes
  export REDO
  one_of SELECT random farthest
  one_of REFERENCE init previous none
  one_of JUDGE implicit vader reward-model pairrm llm openai
  one_of JUDGE_START init previous
  one_of GOLD none vader reward-model pairrm llm openai
  whole_number NPROC
  whole_number NNODES
  whole_number MASTER_PORT
  # what run.sh alone knows; other numbers are checked by their stages (core/preflight.py)
  local name model
  for name in N GOLD_N; do
    [[ ${!name} != 1 ]] || stop "$name=1: a pair takes two responses to a prompt"
  done
  [[ $SEED_SIZE != +(0) || -n $SEED_FRACTION$SEED_POLICY ]] ||
    stop "SEED_SIZE=$SEED_SIZE: without gold pairs SEED_POLICY must name an aligned model"
  [[ $LAMS == *[![:space:]]* ]] || stop "LAMS names no number"
  [[ -z $GOLD_MODEL || $GOLD != none ]] || stop "GOLD_MODEL=$GOLD_MODEL: GOLD must name its kind"
  [[ -z $JUDGE_MODEL || $JUDGE != implicit ]] ||
    stop "JUDGE_MODEL=$JUDGE_MODEL: JUDGE must name its kind"
  for name in JUDGE GOLD; do
    model=${name}_MODEL
    [[ ${!name} != @(reward-model|pairrm|openai) && $name-${!name} != GOLD-llm || -n ${!model} ]] ||
      stop "$name=${!name} needs $model"
  done
  if (( NNODES > 1 )) && ! command -v ${EACH_NODE%% *} >/dev/null; then
    stop "${EACH_NODE%% *}: no such command; EACH_NODE must run a command once on each of" \
      "NNODES=$NNODES machines"
  fi
  if [[ $ANCHOR == init || $EPSILON != @(0|0.0) ]]; then
    # margins are used: they must be against π_init (D1, D10)
    local needs="METHOD=$METHOD with ANCHOR=$ANCHOR, EPSILON=$EPSILON uses confidences"
    needs+=" against π_init"
    needs+="; it goes with METHOD=spa and its own ANCHOR=previous, EPSILON=0"
    [[ $JUDGE == implicit ]] || stop "JUDGE=$JUDGE: $needs"
    [[ $REFERENCE == init ]] || stop "REFERENCE=$REFERENCE: $needs"
    [[ $LENGTH_PENALTY == @(0|0.0) ]] || stop "LENGTH_PENALTY=$LENGTH_PENALTY: $needs"
  fi
  [[ $ANCHOR == init || $EPSILON == @(0|0.0) ]] ||
    stop "EPSILON=$EPSILON moves confidences against π_init; ANCHOR=previous measures others (D6)"
  [[ $JUDGE == implicit || "$REFERENCE $LENGTH_PENALTY" == "init 0" ]] ||
    stop "REFERENCE and LENGTH_PENALTY are of the implicit reward, not of JUDGE=$JUDGE"
}

# -------------------------------------------------------------------------------------- interpreter

satisfied() {  # PYTHON FILE: whether an interpreter has what a requirements file asks for
  "$1" -m core.packages "$2" >/dev/null 2>&1
}
install() {  # FILE: make $python an interpreter that has what it asks for
  command -v "$python" >/dev/null || stop "PYTHON=$python: no such command"
  if [[ ${INSTALL-} == no ]]; then
    local lacking
    lacking=$("$python" -m core.packages "$1" --absent) ||
      stop "PYTHON=$python lacks ${lacking//$'\n'/, } ($1); without INSTALL=no a .venv is made" \
        "that has them"
    return
  fi
  ! satisfied "$python" "$1" || return 0
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  python=.venv/bin/python
  ! satisfied "$python" "$1" || return 0
  echo "installing $1 into .venv" >&2
  "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
}

# ------------------------------------------------------------------------------- how a stage starts

single() {  # a stage on one process; while run.sh is only listed, its command line is printed
  if [[ -n ${listing-} ]]; then
    echo "${*@Q}"
  else
    "$python" "$@"
  fi
}
launch() {  # a stage on all processes of all machines
  if [[ -n ${listing-} ]]; then
    single "$@"
    return
  fi
  # Lengths differ from pass to pass: GPU memory in blocks of fixed size would be full of holes.
  # In the command itself: torch reads it when loaded, and not every launcher forwards variables.
  local allocator=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
  local stage=(env PYTORCH_ALLOC_CONF="$allocator" "$python")
  # torchrun's own number of threads, said beforehand: else it warns of it at every stage.
  local torchrun=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "${stage[@]}")
  torchrun+=(-m torch.distributed.run --nproc_per_node "$NPROC")
  if (( NPROC * NNODES > 1 )); then  # many processes take long to start: has the stage work?
    local status=0
    LOOK=yes "$python" "$@" || status=$?
    (( status == 3 )) || return "$status"
  fi
  if (( NNODES > 1 )); then
    if [[ -z $MASTER_ADDR ]]; then  # this host may be a login node, which the others cannot reach
      MASTER_ADDR=$($EACH_NODE hostname | sort | sed -n 1p)
      [[ -n $MASTER_ADDR ]] || stop "EACH_NODE=$EACH_NODE: reaches no machine; or set MASTER_ADDR"
    fi
    $EACH_NODE "${torchrun[@]}" --nnodes "$NNODES" --rdzv_backend c10d --rdzv_id "$RANDOM" \
      --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" "$@"
  elif (( NPROC > 1 )); then
    "${torchrun[@]}" --standalone "$@"
  else
    "${stage[@]}" "$@"
  fi
}
sampling() {  # a stage that samples; vLLM has processes of its own
  if [[ $BACKEND == vllm ]]; then
    single "$@" --backend vllm
  else
    launch "$@"
  fi
}

ready_model() {  # MODEL as the stages take it
  # the demo's is fetched
  [[ -z $fetch ]] || single -m data.demo --out "$MODEL"
  if [[ $SYSTEM_TURN == empty ]]; then  # it goes into the template, which all policies inherit
    single -m data.system_turn --model "$MODEL" --out "$RUN/init"
    MODEL=$RUN/init
  fi
}

shared_flags() {  # what several stage calls of run.sh have in common
  size=(--seed-size "$SEED_SIZE")
  [[ -z $SEED_FRACTION ]] || size=(--seed-fraction "$SEED_FRACTION")
  [[ -z $SEED_POLICY ]] || size=(--seed-size 0)
  sample=(--max-new-tokens "$MAX_NEW_TOKENS" --sample-tokens "$SAMPLE_TOKENS" --seed "$SEED")
  train=(--beta "$BETA" --batch-size "$BATCH_SIZE" --seed "$SEED" --micro-tokens "$MICRO_TOKENS")
  [[ $SHARD == no ]] || train+=(--gradient-checkpointing)
  [[ $SHARD == no ]] || (( NPROC * NNODES == 1 )) || train+=(--shard)
  endpoint=(--judge-tokens "$JUDGE_TOKENS")
  gold_judge=("${endpoint[@]}" ${GOLD_MODEL:+--judge-model "$GOLD_MODEL"})
  [[ $JUDGE != openai ]] || endpoint+=(${BASE_URL:+--base-url "$BASE_URL"})
  [[ $GOLD != openai ]] || gold_judge+=(${BASE_URL:+--base-url "$BASE_URL"})
}

# ---------------------------------------------------------------------------------------- preflight

prompts_alone() {  # whether DATA holds prompts without preferences, as data.prepare has found
  if [[ -n ${listing-} && ! -e $RUN/data ]]; then
    return 0  # not known yet: the stages of both cases are listed
  fi
  [[ -f $RUN/data/seed_prompts.jsonl ]] || return 1
  [[ $GOLD != none || -n ${listing-} ]] ||
    stop "DATA=$DATA holds prompts alone: GOLD must name who labels the seed"
}
preflight() (  # all stage calls of run.sh are listed, and looked at, before the first starts
  export "${settings[@]}" python fetch
  calls=$(listing=yes bash run.sh)
  "$python" -m core.preflight $check <<<"$calls"
)

# ------------------------------------------------------------------------------------- all together

shopt -s extglob
if [[ -n ${listing-} ]]; then  # settings are what preflight has exported
  ready_model
  shared_flags
  return
fi
python=${PYTHON:-python3}
case ${1-} in
  -h | --help)
    usage
    exit
    ;;
  test)
    install requirements.txt
    install tests/requirements.txt
    "$python" -m ruff check --quiet --select E501 --line-length 100 .
    exec "$python" -m pytest -q -n 2 --dist worksteal "${@:2}" tests
    ;;
esac
check=
if [[ ${*: -1} == --check ]]; then
  check=--check
  set -- "${@:1:$# - 1}"
fi
# what the caller names lies where the caller is
for name in MODEL DATA RUN SEED_POLICY JUDGE_MODEL GOLD_MODEL; do
  path=${!name-}
  [[ $caller != "$PWD" && -n $path && $path != /* ]] || continue
  [[ $name != RUN && ! -e $caller/$path ]] || printf -v "$name" %s "$caller/$path"
done
own=  # what the caller chose besides the config is a part of the run's name
for name in MODEL DATA; do
  path=${!name-}
  path=${path%/}
  path=${path##*/}
  [[ -z $path ]] || own+=-${path%%.@(jsonl|json|csv|parquet)*}
done
config=
if [[ -n ${1-} || -z ${DATA-} ]]; then
  config=${1:-configs/demo.env}
  [[ -f $config || ! -f $caller/$config ]] || config=$caller/$config
  [[ $config != *=* ]] || stop "$config: settings stand before the command: $config bash run.sh"
  [[ $config != --* ]] || stop "$config stands behind a config: bash run.sh configs/NAME.env --tiny"
  [[ -f $config ]] || stop "$config: no such config file"
  set -a  # so that a slip in a config is seen too
  source "$config"
  set +a
fi
[[ ${*:2} == @(|--tiny) ]] ||
  stop "${*:2}: what may follow a config is --tiny, and --check at the end"
define_settings
name=${config:+$(basename "$config" .env)}$own
name=${name#-}
[[ $METHOD == worst-case ]] || name+=-$METHOD
RUN=${RUN:-runs/$name}
[[ $ROUNDS != none ]] || ROUNDS=
check_settings
install requirements.txt
if [[ ${2-} == --tiny ]]; then  # the same stages on a tiny model of the same architecture
  [[ -n ${ARCHITECTURE-} ]] || stop "$config: names no ARCHITECTURE for --tiny"
  RUN=$RUN-tiny
  "$python" -m data.tiny --architecture "$ARCHITECTURE" --out "$RUN/tiny"
  MODEL=$RUN/tiny/model DATA=$RUN/tiny/pairs.jsonl
  SEED_SIZE=8 ROUNDS=${ROUNDS//+([0-9])/6} MAX_NEW_TOKENS=8 BATCH_SIZE=4
  [[ -z $SEED_POLICY ]] || SEED_POLICY=$MODEL MODEL=$RUN/tiny/base
fi
fetch=
if [[ -z $MODEL ]]; then
  MODEL=models/smollm2 fetch=yes
fi
echo "run: $METHOD on $MODEL, data $DATA, ε $EPSILON, α $ALPHA, lr $LR, n $N, seed $SEED → $RUN"
preflight
[[ -z $check ]] || exit 0
ready_model
shared_flags
