# What the recipes share: options, and the steps of a round. Sourced by them.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

common_options() {
    cat <<'TEXT'
  --policy P           run directory or Hugging Face folder to start from
  --prompts FILE       prompts to answer in every round
  --dir D              folder of the recipe
  --rounds N           number of rounds (default: 3)
  --ranks-per-node P   ranks on this machine, as in launch/torchrun.sh
  --dry-run            print the commands and run nothing
  --help               print this text
  ARGUMENT             --config FILE and key=value of all commands, reward.source among them

The policy of the last round is DIR/policy. The same line again continues: what is done is not
repeated, and an interrupted step resumes. Exit codes are those of launch/torchrun.sh; 75 means
start it again. MARLHF=COMMAND runs the steps by another command than launch/torchrun.sh,
PYTHON=/path/to/python chooses the Python.
TEXT
}

refuse() {
    echo "$1" >&2
    exit 2
}

# Read the options of a recipe into policy, prompts, dir, rounds and arguments. The recipe has `usage`
# and `own_option NAME VALUE`, which fails for an option that it does not have.
read_options() {
    policy='' prompts='' dir='' rounds=3 dry_run=false arguments=()
    local ranks=()
    while (($#)); do
        case $1 in
            --help | -h)
                usage
                exit 0
                ;;
            --dry-run) dry_run=true ;;
            --config)
                (($# > 1)) || refuse "$1: needs a value. See --help."
                arguments+=("$1" "$2")
                shift
                ;;
            --*)
                (($# > 1)) || refuse "$1: needs a value. See --help."
                case $1 in
                    --policy) policy=$2 ;;
                    --prompts) prompts=$2 ;;
                    --dir) dir=${2%/} ;;
                    --rounds) rounds=$2 ;;
                    --ranks-per-node) ranks=("$1" "$2") ;;
                    *) own_option "$1" "$2" || refuse "$1: unknown option. See --help." ;;
                esac
                shift
                ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    [[ -n $policy && -n $prompts && -n $dir ]] ||
        refuse "${0##*/}: needs --policy, --prompts and --dir. See --help."
    [[ $rounds =~ ^[1-9][0-9]*$ ]] || refuse "--rounds=$rounds: must be a number from 1. See --help."
    [[ -f $prompts ]] || refuse "--prompts=$prompts: no such file. Give a file of prompts."
    python=${PYTHON:-}
    if [[ -z $python ]]; then
        python=python3
        [[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    launcher=(bash "$root/launch/torchrun.sh" ${ranks[@]+"${ranks[@]}"})
    [[ -z ${MARLHF:-} ]] || read -ra launcher <<<"$MARLHF"
}

run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# step JOB KEY=VALUE ...: a command with the user's arguments, which these override.
step() {
    local job=$1
    shift
    run "${launcher[@]}" "$job" ${arguments[@]+"${arguments[@]}"} "$@"
}

# answer FOLDER POLICY ROUND: the policy answers all prompts, with draws of the round, and is scored.
answer() {
    [[ ! -f $1/answered ]] || return 0
    step generate model.init="$2" data.validation_path="$prompts" run.dir="$1/answers" \
        run.seed="$3"
    $dry_run || touch "$1/answered"
}

# choose FOLDER NAME OPTION ...: what tools/pairs.py makes of the answers, in FOLDER/NAME.
choose() {
    local folder=$1 out=$1/$2
    shift 2
    [[ -f $out ]] ||
        run "$python" "$root/tools/pairs.py" "$out" "$@" "$folder"/answers/responses/*.jsonl
}

# finish POLICY: name the policy of the last round.
finish() {
    run ln -sfn "${1#"$dir"/}" "$dir/policy"
    echo "$dir/policy: the policy of round $rounds"
}
