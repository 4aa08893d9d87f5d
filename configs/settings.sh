# What run.sh needs before its algorithm: the interpreter, settings, and how a stage starts.
# Sourced by run.sh with its arguments. `[[ A ]] || B` says: unless A, B.
shopt -s extglob

stop() {
  echo "error: $*" >&2
  exit 2
}

# -------------------------------------------------------------------------------------- interpreter

python=${PYTHON:-.venv/bin/python}

install() {  # FILE of requirements, into .venv; where PYTHON names an interpreter, nothing
  local installed=.venv/installed-${1//\//-}
  [[ -z ${PYTHON-} ]] && ! cmp -s "$1" "$installed" || return 0
  if [[ ! -x $python ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      stop "python3 is older than 3.11; make .venv by a newer one: python3.12 -m venv .venv"
    python3 -m venv .venv
  fi
  echo "installing $1 into .venv" >&2
  "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
  cp "$1" "$installed"
}

if [[ ${1-} == test ]]; then
  install requirements.txt
  install tests/requirements.txt
  "$python" -m ruff check --quiet .
  exec "$python" -m pytest -q -n 2 --dist worksteal "${@:2}" tests
fi

# ----------------------------------------------------------------------------------------- settings
# The command line wins, then the config, then configs/defaults.env.

declare -A given=()
mapfile -t names < <(grep -oE '^[A-Z_]+' configs/defaults.env)
# What other programs call a setting.
declare -A ALIASES=([LEARNING_RATE]=LR [EPOCHS]=SEED_EPOCHS [EPS]=EPSILON [DATASET]=DATA
  [OUTPUT_DIR]=RUN [OUT]=RUN [NUM_SAMPLES]=N [MAX_TOKENS]=MAX_NEW_TOKENS [LAMBDA]=LAMS [GPUS]=NPROC)

nearest() {  # WORD CHOICES…: the one that it may be a slip of
  python3 -c 'import difflib as d, sys; print(*d.get_close_matches(sys.argv[1], sys.argv[2:], 1))' \
    "$@" 2>/dev/null || true
}

read_config() {  # FILE of lines NAME=value; a value is the rest of its line, outer quotes off
  local line name value
  while read -r line || [[ -n $line ]]; do
    line=${line%%*([[:space:]])}
    [[ -n $line && $line != \#* ]] || continue
    [[ $line =~ ^([A-Za-z_]+)=(.*)$ ]] || stop "$1: not a line NAME=value: $line"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ $value != \"*\" && $value != \'*\' ]] || value=${value:1:-1}
    [[ -v given[$name] ]] || given[$name]=$value
  done <"$1"
}

check='' tiny='' config='' data=''
for word in "$@"; do
  case $word in
    --check) check=yes ;;
    --tiny) tiny=yes ;;
    --help | -h)
      sed -n '2,/^$/s/^# \?//p' run.sh
      cat configs/defaults.env
      exit 0 ;;
    +([A-Za-z0-9_])=*) given[${word%%=*}]=${word#*=} ;;
    *)
      choices=(test --check --tiny --help configs/!(defaults).env)
      [[ -f $word ]] || stop "$word: neither NAME=VALUE (ROUNDS='8 8' takes quotes) nor one of:" \
        "${choices[@]} (nearest: $(nearest "$word" "${choices[@]}"))"
      [[ -z $config ]] || stop "$word: a second config; the first is $config"
      config=$word ;;
  esac
done
# With other DATA, GOLD and PROMPTS_ALONE of the config do not count; with MODEL, its SYSTEM_TURN.
if [[ -v given[DATA] ]]; then
  data=-$(basename "${given[DATA]%.*}")
  given[GOLD]=${given[GOLD]-none}
  given[PROMPTS_ALONE]=${given[PROMPTS_ALONE]-no}
elif [[ -z $config ]]; then
  config=configs/demo.env
fi
[[ ! -v given[MODEL] ]] || given[SYSTEM_TURN]=${given[SYSTEM_TURN]-none}
[[ -z $config ]] || read_config "$config"
for name in "${!given[@]}"; do
  [[ " ${names[*]} " != *" $name "* ]] || continue
  near=$(nearest "${name^^}" "${names[@]}" "${!ALIASES[@]}")
  near=${ALIASES[${near:-none}]-$near}
  stop "$name is no setting${near:+; is $near meant?} (bash run.sh --help lists them)"
done
[[ ${given[METHOD]-} != spa ]] || given[EPSILON]=${given[EPSILON]-0}
read_config configs/defaults.env
for name in "${names[@]}"; do
  # METHOD=spa before the command would be ignored in silence.
  [[ ! -v $name ]] || stop "$name stands in the environment; give it as an argument, bash run.sh" \
    "$name='${!name}', or take it away: env -u $name bash run.sh"
  printf -v "$name" %s "${given[$name]}"
done

# ------------------------------------------ checks of what no stage can know; stages check the rest

one_of() {  # NAME CHOICES…
  [[ " ${*:2} " == *" ${!1} "* && ${!1} != *" "* ]] || stop "$1=${!1}: must be one of: ${*:2}"
}
is_zero() { [[ $1 =~ ^[+-]?0*\.?0*([eE][+-]?[0-9]+)?$ ]]; }

[[ $PROMPTS_ALONE != yes || $GOLD != none || $SEED_POLICY ]] || stop "PROMPTS_ALONE=yes: say who" \
  "judges the seed, GOLD=vader, reward-model, … (a config's own GOLD is for its own DATA)"
[[ -z $SEED_POLICY || $REPLAY$FLIP-$JUDGE$JUDGE_MODEL == no*([0.])-!(llm) ]] || stop \
  "SEED_POLICY leaves no gold pairs to REPLAY=yes, to FLIP, or to JUDGE=llm without JUDGE_MODEL"
one_of METHOD worst-case spa
one_of SYSTEM_TURN none empty
one_of JUDGE_START init previous
for name in PROMPTS_ALONE REPLAY SHARD REDO; do one_of $name yes no; done
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || stop "NPROC=$NPROC: must be a whole number, at least 1"
[[ ! $N =~ ^0*1$ ]] || stop "N=$N: a pair takes two responses"
[[ $SEED_FRACTION$SEED_POLICY || ! $SEED_SIZE =~ ^0+$ ]] ||
  stop "SEED_SIZE=$SEED_SIZE: without gold pairs SEED_POLICY must name an aligned model"
if [[ $METHOD == spa ]]; then
  is_zero "$EPSILON" || stop "EPSILON=$EPSILON: a worst case is METHOD=worst-case (D6)"
elif [[ $JUDGE-$REFERENCE-$REPLAY != implicit-init-no ]] || ! is_zero "$LENGTH_PENALTY"; then
  stop "JUDGE=$JUDGE REFERENCE=$REFERENCE LENGTH_PENALTY=$LENGTH_PENALTY REPLAY=$REPLAY goes with" \
    "METHOD=spa; worst-case takes implicit, init, 0 and no: confidences against π_init (D1, D10)"
fi

# ------------------------------------------------------------------------------- how a stage starts

name=$(basename "$config" .env)$data
[[ $METHOD == worst-case || $name == *-$METHOD ]] || name+=-$METHOD
RUN=${RUN:-runs/${name#-}}
RUN=${RUN%/}
ours=$(ls -d "$RUN"/{,*/}*.{stats.json,unfinished} 2>/dev/null || true)  # what stages leave
[[ $ours || ! $(ls -A "$RUN/" 2>/dev/null) ]] || stop "RUN=$RUN/: holds no run; name another folder"
if [[ -n $tiny ]]; then  # the same stages on a tiny model of the same architecture
  RUN+=-tiny
  MODEL=$RUN/tiny/model DATA=$RUN/tiny/pairs.jsonl PROMPTS_ALONE=no
  SEED_SIZE=8 ROUNDS=${ROUNDS//+([0-9])/6} MAX_NEW_TOKENS=8 BATCH_SIZE=4
  [[ -z $SEED_POLICY ]] || SEED_POLICY=$MODEL MODEL=$RUN/tiny/base
fi
[[ -n $config || ( -e /dev/nvidia0 && $MODEL != models/smollm2 ) ]] || echo "note: these are the" \
  "settings of a 7 B model on GPUs; a small one's: bash run.sh configs/demo.env DATA=$DATA" >&2
export REDO  # to core/stage.py
install requirements.txt
echo "run: $METHOD on $MODEL, data $DATA, ε $EPSILON, α $ALPHA, lr $LR, n $N, seed $SEED → $RUN"

pass=look    # or work
promised=''  # PATH, TAB, BYTES of all that will be written
problems=''  # what the stages found wrong
states=()    # complete, to do, …: what the stages said of themselves, in their order
number=0     # of the stage that works

stage() {  # [-m] PROGRAM FLAGS …
  local program=$1 out starter=("$python")
  [[ $1 != -m ]] || program=$2
  out=$(out_of "$@")
  if [[ $pass == look ]]; then
    look "$program" "$out" "$@"
    return
  fi
  if [[ ${states[number]} == complete || $program == data.* || $program == dro.py ||
    $BACKEND-$program == vllm-generate.py ]]; then
    :  # one process is enough, and vLLM has processes of its own
  elif [[ -n $LAUNCH ]]; then
    starter=($LAUNCH)
  elif (( NPROC > 1 )); then
    # torchrun's own number of threads, given beforehand: else it warns of it at every stage.
    starter=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m torch.distributed.run
      --standalone --nproc_per_node "$NPROC")
  fi
  number=$((number + 1))
  echo "[$number/${#states[@]}] $program → $out"
  "${starter[@]}" "$@"
}
out_of() {  # what stands behind --out
  until [[ $1 == --out ]]; do shift; done
  echo "$2"
}
look() {  # PROGRAM OUT COMMAND …; in core/stage.py: what a stage prints, and its exit status
  local program=$1 out=$2 status=0 answer state bytes
  answer=$(LOOK=yes PROMISED=$promised "$python" "${@:3}" 2>&1) || status=$?
  IFS=$'\t' read -r state bytes < <(grep $'\t' <<<"$answer") || state=WRONG bytes=0
  printf '  %-9s %-18s → %s\n' "$state" "$program" "${out#"$RUN"/}"
  (( status == 0 )) || promised+=$out$'\t'$bytes$'\n'
  if (( status != 0 && status != 3 )) && [[ $state != changed || ${states[*]} != *changed* ]]; then
    # What has changed is said once: the rest follows from it.
    problems+=$(grep '^error: ' <<<"$answer" || echo "error: $program: $answer")$'\n'
  fi
  states+=("$state")
}

look_then_work() {
  algorithm  # plainly: as a condition it would go on after a stage that has failed
  if [[ -n $problems ]]; then  # of stages that say the same, one
    awk -F': ' '{ sub(/ \(see python .*/, "") } !said[$3 == "cannot be written" ? $4 : $0]++' \
      <<<"${problems%$'\n'}" >&2
    exit 2
  fi
  if [[ -z $promised ]]; then
    echo "$RUN: complete, skipped"
    sed '/^!\[/,$d' "$RUN/report.md"
  elif [[ -z $check ]]; then
    pass=work
    algorithm
  fi
}
