# What run.sh needs before its algorithm: settings, the interpreter, and how a stage starts.
# Sourced by run.sh with its arguments.
shopt -s extglob

stop() {
  echo "error: $*" >&2
  exit 2
}

# ----------------------------------------------------------------------------------------- settings
# The command line wins, then the config, then the default.

declare -A given=()
names=()

variable() {  # NAME DEFAULT MEANING: a setting that may also stand in the environment
  names+=("$1")
  printf -v "$1" %s "${given[$1]-${!1-$2}}"
  unset "given[$1]"  # what is left there after the last of them is no setting
  [[ -z $help ]] || printf '  %-15s %s\n%18sdefault: %s\n' "$1" "$3" "" "$2"
}
setting() {  # as `variable`; METHOD=spa before the command must not train the worst case
  [[ ! -v $1 ]] || stop "$1 stands in the environment; give it as an argument, bash run.sh" \
    "$1='${!1}', or take it away: env -u $1 bash run.sh"
  variable "$@"
}

define_settings() {
  setting METHOD worst-case "worst-case (SGPO/SSAPO, the thesis) or spa"
  setting MODEL models/smollm2 "π_init: a folder or hub id; this one, the demo's, is fetched"
  setting SYSTEM_TURN none "empty: MODEL was tuned with an empty system turn where there is none"
  setting DATA "" "preferences, or prompts alone: a file, or what \`datasets\` loads"
  setting PROMPTS_ALONE no "yes: DATA has no preferences, or none to use; GOLD labels the seed"
  setting RUN "" "folder of this run; empty: runs/ and a name made of config, data and method"
  setting SEED 42 "decides data split, order and sampling"

  setting SEED_SIZE 2000 "gold pairs"
  setting SEED_FRACTION "" "gold pairs as a share of all prompts, in the place of SEED_SIZE"
  setting SELECT random "how gold prompts are chosen: random, or farthest (those that differ most)"
  setting FLIP 0 "share of the gold labels turned wrong on purpose"
  setting ROUNDS "8000 20000 30000" "prompts of each round; empty: the seed stage alone"
  setting SEED_POLICY "" "an aligned model in the place of π_0, and no gold seed; MODEL is π_init"
  setting GOLD none "judges seeds without labels, and the evaluation: none, vader, reward-model, …"
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
  setting LAMS "0.5 0.25 0.125" "SPA: extrapolation λ, round by round"
  setting PERCENTILE 10 "SPA: share of the pairs to flag, in percent"
  local epsilon=0.01
  [[ $METHOD != spa ]] || epsilon=0
  setting EPSILON $epsilon "the follower's radius ε; 0: no worst case"
  setting PIECES 6 "tangents of −log ξ"
  setting GROUP "" "pairs a group of the follower (the thesis: 100); empty: all in one"

  setting JUDGE implicit "labels the rounds: implicit (SPA), reward-model, pairrm, llm, openai, …"
  setting JUDGE_MODEL "" "that judge's model; llm without one is trained on the gold seed"
  setting BASE_URL "" "endpoint of openai judges; empty: OpenAI's own"
  setting JUDGE_TOKENS 16 "room for an answer of that endpoint; more where it reasons first"
  setting JUDGE_LR 2e-5 "learning rate at which JUDGE=llm is trained on the seed"
  setting JUDGE_START init "when: once, from π_init, or (previous) in every round, from π_{t−1}"
  setting REFERENCE init "of the implicit reward: init, previous, none (SPA, Table 7)"
  setting LENGTH_PENALTY 0 "taken off the implicit reward, a token (S13)"

  setting EVAL_SIZE 805 "prompts of the evaluation, at most"
  setting EVAL_N 1 "answers a prompt"

  setting PRECISION auto "of matrix products: bf16, fp32, or auto: bf16 where it is faster"
  setting NPROC 1 "processes (GPUs) on this machine"
  setting LAUNCH "" "starts a stage on several machines (docs/scale.md); empty: NPROC, here"
  setting BACKEND transformers "of sampling: transformers, or vllm (all GPUs of this machine)"
  setting SAMPLE_TOKENS 131072 "tokens sampled together, prompts and answers: memory, not text"
  setting SHARD no "yes: weights, gradients and Adam in shards over all processes"
  setting MICRO_TOKENS 2048 "tokens a training pass and process: memory, not mathematics"
  setting ARCHITECTURE "" "of the random model of --tiny"

  variable REDO no "yes: replace complete stages whose settings have changed"
  variable PYTHON "" "an interpreter, taken as it is; empty: .venv, made and filled by pip"
}

# What other programs call a setting.
declare -A ALIASES=([LEARNING_RATE]=LR [EPOCHS]=SEED_EPOCHS [EPS]=EPSILON [DATASET]=DATA
  [OUTPUT_DIR]=RUN [OUT]=RUN [NUM_SAMPLES]=N [MAX_TOKENS]=MAX_NEW_TOKENS [LAMBDA]=LAMS [GPUS]=NPROC)

nearest() {  # WORD WORDS…: the one that WORD may be a slip of
  python3 -c 'import difflib as d, sys; print(*d.get_close_matches(sys.argv[1], sys.argv[2:], 1))' \
    "$@" 2>/dev/null || true
}

read_config() {  # FILE of lines NAME=value; a value is the rest of its line, outer quotes off
  local line name value
  while read -r line || [[ -n $line ]]; do
    line=${line%%*([[:space:]])}
    [[ -n $line && $line != \#* ]] || continue
    [[ $line =~ ^([A-Za-z_]+)=(.*)$ ]] || stop "$1: not a line NAME=value: $line"
    name=${BASH_REMATCH[1]}
    value=${BASH_REMATCH[2]}
    [[ $value != \"*\" && $value != \'*\' ]] || value=${value:1:-1}
    [[ -v given[$name] ]] || given[$name]=$value
  done <"$1"
}

# ------------------------------------------ checks of what no stage can know; stages check the rest

one_of() {  # NAME CHOICES…
  [[ " ${*:2} " == *" ${!1} "* && ${!1} != *" "* ]] || stop "$1=${!1}: must be one of: ${*:2}"
}
is_zero() { [[ $1 =~ ^[+-]?0*\.?0*([eE][+-]?[0-9]+)?$ ]]; }

check_settings() {
  local name near
  for name in "${!given[@]}"; do
    near=${ALIASES[${name^^}]-$(nearest "${name^^}" "${names[@]}")}
    stop "$name is no setting${near:+; is $near meant?} (bash run.sh --help lists them)"
  done
  one_of METHOD worst-case spa
  one_of SYSTEM_TURN none empty
  one_of JUDGE_START init previous
  for name in SHARD REDO PROMPTS_ALONE; do one_of $name yes no; done
  for name in N GOLD_N NPROC; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: must be a whole number, at least 1"
  done
  (( N > 1 && GOLD_N > 1 )) || stop "N=$N, GOLD_N=$GOLD_N: a pair takes two responses"
  [[ $SEED_FRACTION$SEED_POLICY || ! $SEED_SIZE =~ ^0+$ ]] ||
    stop "SEED_SIZE=$SEED_SIZE: without gold pairs SEED_POLICY must name an aligned model"
  [[ $PROMPTS_ALONE == no || $SEED_POLICY || $GOLD != none ]] ||
    stop "PROMPTS_ALONE=yes: GOLD must name who labels the seed"
  [[ $LAMS == *[![:space:]]* ]] || stop "LAMS names no number"
  if [[ $METHOD == spa ]]; then
    is_zero "$EPSILON" || stop "EPSILON=$EPSILON: a worst case is METHOD=worst-case (D6)"
  elif [[ $JUDGE-$REFERENCE != implicit-init ]] || ! is_zero "$LENGTH_PENALTY"; then
    stop "JUDGE=$JUDGE REFERENCE=$REFERENCE LENGTH_PENALTY=$LENGTH_PENALTY goes with METHOD=spa:" \
      "METHOD=worst-case needs confidences of π_{t−1} against π_init (D1, D10)"
  fi
}

# -------------------------------------------------------------------------------------- interpreter

install() {  # FILE: make $python an interpreter that has what a requirements file asks for
  python=$PYTHON
  [[ -z $python ]] || return 0
  local stamp=.venv/installed-${1//\//-}
  python=.venv/bin/python
  [[ ! $stamp -nt $1 ]] || return 0
  if [[ ! -x $python ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      stop "python3 is older than 3.11; make .venv by a newer one: python3.12 -m venv .venv"
    python3 -m venv .venv
  fi
  echo "installing $1 into .venv" >&2
  "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
  touch "$stamp"
}

# ------------------------------------------------------------------------------- how a stage starts

pass=look    # or work
pending=''   # not empty where a stage has work
problems=''  # what the stages found wrong
plan=''      # a line a stage
promised=''  # PATH, TAB, BYTES of all that stages will write
count=0      # stages in all
number=0     # stages that were started

stage() {  # [-m] PROGRAM FLAGS …, on one process
  local program=${1/#-m/$2} out="$* "
  out=${out##* --out }
  out=${out%% *}
  if [[ $pass == look ]]; then
    look "$@"
    return
  fi
  number=$((number + 1))
  echo "[$number/$count] $program → $out"
  "${starter[@]}" "$@"
}
look() {  # a stage that looks says STATE, OUT and BYTES
  local status=0 answer state=WRONG bytes=0
  answer=$(LOOK=yes PROMISED=$promised "$python" "$@" 2>&1) || status=$?
  [[ $answer != *$'\t'* ]] ||
    IFS=$'\t' read -r state out bytes < <(grep $'\t' <<<"$answer")
  count=$((count + 1))
  plan+=$(printf '  %-9s %-18s → %s' "$state" "$program" "${out#"$RUN"/}")$'\n'
  (( status == 0 )) || promised+=$out$'\t'$bytes$'\n'
  if (( status == 3 )); then
    pending=yes
  elif (( status != 0 )) && [[ $state != changed || $plan != *"  changed "*"  changed "* ]]; then
    # What has changed is said once: the rest follows from it.
    problems+=$(grep '^error: ' <<<"$answer" || echo "error: $program: $answer")$'\n'
  fi
}
sampling() {  # a stage that samples; vLLM has processes of its own
  if [[ $BACKEND == vllm ]]; then stage "$@"; else launch "$@"; fi
}
launch() {  # a stage on all processes
  local starter=("${starter[@]}")
  if [[ $pass == work && $LAUNCH$NPROC != 1 ]]; then
    # Many processes take long to start: has the stage work?
    ! LOOK=yes "$python" "$@" >/dev/null || return 0
  fi
  if [[ -n $LAUNCH ]]; then
    starter=($LAUNCH)
  elif (( NPROC > 1 )); then
    # torchrun's own number of threads, given beforehand: else it warns of it at every stage.
    starter=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m torch.distributed.run
      --standalone --nproc_per_node "$NPROC")
  fi
  stage "$@"
}

look_then_work() {
  algorithm  # plainly: as a condition it would go on after a stage that has failed
  [[ -z $check && -n $pending$problems ]] || printf %s "$plan"
  if [[ -n $problems ]]; then
    sort -u <<<"${problems%$'\n'}" >&2
    exit 2
  fi
  [[ -n $pending ]] || { echo "$RUN: complete, skipped" && sed '/^!\[/,$d' "$RUN/report.md"; }
  [[ -z $check && -n $pending ]] || exit 0
  pass=work
  algorithm
}

# ------------------------------------------------------------------------------------- all together

if [[ ${1-} == test ]]; then
  PYTHON=${PYTHON-}
  install requirements.txt
  install tests/requirements.txt
  "$python" -m ruff check --quiet .
  exec "$python" -m pytest -q -n 2 --dist worksteal "${@:2}" tests
fi

check='' tiny='' help='' config=''
for word in "$@"; do
  case $word in
    --check) check=yes ;;
    --tiny) tiny=yes ;;
    --help | -h) help=yes ;;
    [A-Za-z_]*=*) given[${word%%=*}]=${word#*=} ;;
    *)
      near=$(nearest "$word" test --check --tiny --help configs/*.env)
      [[ -f $word ]] || stop "$word: neither NAME=VALUE nor a config${near:+; is $near meant?}"
      [[ -z $config ]] || stop "$word: a second config; the first is $config"
      config=$word
      ;;
  esac
done
# A run is named after its config, and after what the command line gives.
title=
for path in "${given[MODEL]-}" "${given[DATA]-}"; do
  path=$(basename "$path")
  [[ -z $path ]] || title+=-${path%%.@(jsonl|json|csv|tsv|txt|parquet)*}
done
[[ -n $config || -v given[DATA] || -n $help ]] || config=configs/demo.env
# A config's empty system turn is its own model's; its gold judge is its own data's.
[[ ! -v given[MODEL] ]] || given[SYSTEM_TURN]=${given[SYSTEM_TURN]-none}
[[ ! -v given[DATA] ]] || given[GOLD]=${given[GOLD]-none}
[[ ! -v given[DATA] ]] || given[PROMPTS_ALONE]=${given[PROMPTS_ALONE]-no}
[[ -z $config ]] || read_config "$config"
[[ -z $help ]] || sed -n '2,/^$/s/^# \?//p' run.sh
define_settings
[[ -z $help ]] || exit 0
check_settings
title=${config:+$(basename "$config" .env)}$title
[[ $METHOD == worst-case || $title == *-$METHOD ]] || title+=-$METHOD
RUN=${RUN:-runs/${title#-}}
RUN=${RUN%/}
if [[ -n $tiny ]]; then  # the same stages on a tiny model of the same architecture
  RUN+=-tiny
  MODEL=$RUN/tiny/model DATA=$RUN/tiny/pairs.jsonl PROMPTS_ALONE=no
  SEED_SIZE=8 ROUNDS=${ROUNDS//+([0-9])/6} MAX_NEW_TOKENS=8 BATCH_SIZE=4
  [[ -z $SEED_POLICY ]] || SEED_POLICY=$MODEL MODEL=$RUN/tiny/base
fi
if [[ -z $config && ! -e /dev/nvidia0 ]]; then
  echo "note: these are the settings of a 7 B model, and there is no GPU here; for a small model" \
    "on two cores: bash run.sh configs/demo.env DATA=$DATA" >&2
fi
export REDO
install requirements.txt
starter=("$python")
# Lengths differ from pass to pass: GPU memory in blocks of fixed size would be full of holes.
allocator=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-$allocator}
echo "run: $METHOD on $MODEL, data $DATA, ε $EPSILON, α $ALPHA, lr $LR, n $N, seed $SEED → $RUN"
