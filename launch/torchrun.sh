#!/usr/bin/env bash
# Run a marlhf command on the ranks of one or more machines, and restart it after faults.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [OPTION ...] COMMAND --config FILE [key=value ...]

Checks the configuration in one process, then starts `marlhf COMMAND` on every rank under torchrun.
On several machines, run the same line on each machine with its own --node-rank.

  --nodes N            number of machines (default: PET_NNODES, else 1)
  --node-rank R        number of this machine, 0 .. N-1 (default: PET_NODE_RANK, else 0)
  --ranks-per-node P   ranks on this machine (default: PET_NPROC_PER_NODE, else the number of GPUs,
                       else 1)
  --master HOST[:PORT] machine with node rank 0 (default: PET_MASTER_ADDR:PET_MASTER_PORT; default
                       port: 29400)
  --run-id ID          name of the launch, the same on all its machines (default: marlhf)
  --restarts K         how often to restart all ranks after a fault (default: 3)
  --join-seconds S     how long to wait for the other machines (default: 600)
  --exact              make runs on GPUs bit-exact, at some cost in speed
  --dry-run            print the environment and the command and start nothing
  --help               print this text

On SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, to the script or to all processes, the run finishes its step,
saves a checkpoint and exits with 75; evaluate and doctor end at once.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 pre-empted (start it again),
76 no progress (do not start it again).
PYTHON=/path/to/python chooses the Python (default: .venv's if it exists, else python3).
Example: bash launch/torchrun.sh --ranks-per-node 4 sft --config configs/e2e_nlg_sft.yaml
TEXT
}

refuse() {
    echo "$1" >&2
    exit 2
}

# shellcheck source-path=SCRIPTDIR/..
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

nodes=${PET_NNODES:-1}
node_rank=${PET_NODE_RANK:-0}
ranks=${PET_NPROC_PER_NODE:-}
master=${PET_MASTER_ADDR:+$PET_MASTER_ADDR:${PET_MASTER_PORT:-29400}}
run_id=marlhf restarts=3 join_seconds=600 exact=false dry_run=false
while (($#)) && [[ $1 == -* ]]; do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --dry-run) dry_run=true ;;
        --exact) exact=true ;;
        --nodes | --node-rank | --ranks-per-node | --master | --run-id | --restarts | --join-seconds)
            (($# > 1)) || refuse "$1: needs a value. See --help."
            case $1 in
                --nodes) nodes=$2 ;;
                --node-rank) node_rank=$2 ;;
                --ranks-per-node) ranks=$2 ;;
                --master) master=$2 ;;
                --run-id) run_id=$2 ;;
                --restarts) restarts=$2 ;;
                --join-seconds) join_seconds=$2 ;;
            esac
            shift
            ;;
        *) refuse "$1: unknown option. See --help." ;;
    esac
    shift
done
(($#)) || refuse "launch/torchrun.sh: needs a command such as ppo; none was given. See --help."

# The machine.
gpus=0 capability=
if [[ -z ${CUDA_VISIBLE_DEVICES+set} || -n $CUDA_VISIBLE_DEVICES ]] &&
    command -v nvidia-smi >/dev/null; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
    capability=${capability%%$'\n'*}
    [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || capability=
    if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        gpus=${#visible[@]}
    elif [[ -n $capability ]]; then
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
    fi
fi
case $ranks in
    '' | auto | gpu) ranks=$((gpus > 0 ? gpus : 1)) ;;
esac
for pair in "--nodes=$nodes" "--node-rank=$node_rank" "--ranks-per-node=$ranks" \
    "--restarts=$restarts" "--join-seconds=$join_seconds"; do
    [[ ${pair#*=} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "$pair: must be a whole number. Change it."
done
((nodes > 0)) || refuse "--nodes=$nodes: must be at least 1. Change it."
((ranks > 0)) || refuse "--ranks-per-node=$ranks: must be at least 1. Change it."
((node_rank < nodes)) ||
    refuse "--node-rank=$node_rank: must be below --nodes=$nodes. Number machines from 0."
[[ $nodes == 1 || -n $master ]] ||
    refuse "--master: $nodes machines need the address of the first. Give HOST or HOST:PORT."

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# One process checks the configuration first: torchrun would bury a wrong key under its own output.
# A dry run needs neither data nor models, so it only resolves the configuration.
config=
[[ $1 != plan ]] || refuse "plan: runs without ranks. Run marlhf plan instead."
if [[ $1 == doctor ]]; then
    restarts=0 # its exit code is its result
else
    check=(--check --print-config)
    ! $dry_run || check=(--print-config)
    config=$(WORLD_SIZE=$((nodes * ranks)) "$python" -m marlhf_mega "$@" "${check[@]}") || exit
    if [[ $config == "already complete"* ]]; then
        echo "$config"
        exit 0
    fi
fi
tensor_size=$(awk '$1 == "tensor_size:" { print $2; exit }' <<<"$config")
choose_environment "$nodes" "${master%:*}" "$capability" "${tensor_size:-1}" "$exact"

if ((nodes == 1)); then
    rendezvous=(--standalone)
else
    [[ $master == *:* ]] || master=$master:29400
    # State explicitly which machine is the master: torchrun's guess can take more than a minute and
    # fails if the name does not resolve.
    is_host=$( ((node_rank == 0)) && echo true || echo false)
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$master"
        --rdzv-id "$run_id" --rdzv-conf "is_host=$is_host,join_timeout=$join_seconds")
    address=$(address_of "${GLOO_SOCKET_IFNAME-}")
    [[ -z $address ]] || rendezvous+=(--local-addr "$address")
fi
handled=SIGHUP,SIGQUIT saves=true
case $1 in
    evaluate | doctor) saves=false handled=SIGTERM,SIGINT,$handled ;;
esac
# shellcheck disable=SC2054 # the commas are part of the values
command=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$ranks"
    --max-restarts "$restarts" --signals-to-handle "$handled" -m marlhf_mega "$@")

if $dry_run; then
    print_environment
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# torchrun treats every exit code but 0 as a fault and itself exits with 1. A run that must not be
# restarted writes its code to a file and exits with 0.
notes=$(mktemp -d)
trap 'rm -rf -- "$notes"' EXIT
export MARLHF_EXIT_CODE_FILE=$notes/exit_code MARLHF_STOP_FILE=$notes/stop

# On a signal torchrun would kill the ranks in the middle of a step. So it ignores what a terminal,
# `timeout` or Slurm sends to all processes, and the ranks look for a file after every step: unlike a
# signal, it also reaches ranks that are still starting.
#
# shellcheck disable=SC2329 # called by the trap
ask_to_stop() {
    if ! $saves; then
        kill -HUP "${launcher-}" 2>/dev/null || true
    elif [[ ! -e $MARLHF_STOP_FILE ]]; then
        touch -- "$MARLHF_STOP_FILE"
        [[ ! -t 2 ]] || printf '\r\033[K' >&2 || true # over a progress bar
        echo "asked to stop: the run saves after this step and ends (Ctrl-\\ ends it at once," \
            "unsaved)" >&2 || true
    fi
}
trap ask_to_stop TERM INT USR1
(
    ! $saves || trap '' TERM INT USR1
    # Nothing must train on without this script, which may be killed.
    exec "$python" -m marlhf_mega.lifeline "$$" "${command[@]:1}"
) &
launcher=$!
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break # otherwise a signal interrupted the wait
done

recorded=$(cat -- "$MARLHF_EXIT_CODE_FILE" 2>/dev/null) || true
if [[ $recorded =~ ^[0-9]+$ ]]; then
    exit "$recorded"
fi
exit "$code"
