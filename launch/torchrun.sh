#!/usr/bin/env bash
# One command of marlhf on the ranks of one machine or of many, restarted after faults.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [OPTION ...] COMMAND --config FILE [key=value ...]

Checks the configuration with one process, then starts `marlhf COMMAND` on every rank under
torchrun. On several machines run the same line on each, with its own --node-rank.

  --nodes N            machines (default: PET_NNODES, else 1)
  --node-rank R        which of them this is, 0 .. N-1 (default: PET_NODE_RANK, else 0)
  --ranks-per-node P   ranks here (default: PET_NPROC_PER_NODE, else the number of GPUs, else 1)
  --master HOST[:PORT] the machine with node rank 0 (default: PET_MASTER_ADDR:PET_MASTER_PORT;
                       port 29400)
  --run-id ID          the same word on every machine of a run (default: marlhf)
  --restarts K         times that all ranks start again after a fault (default: 3)
  --join-seconds S     how long to wait for the other machines (default: 600)
  --exact              the same bits in every run on GPUs, at some cost in speed
  --dry-run            print the environment and the command, start nothing
  --help               this text

SIGTERM, SIGINT and SIGUSR1 ask the run to finish its step and save.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 pre-empted (start it again),
76 no progress (do not). PYTHON=/path/to/python chooses the Python; else .venv's, else python3.
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

# Read the configuration in one process: torchrun would wrap a wrong key in a page of its own. The
# dry run needs neither the data nor the models, so it only resolves it.
config=
[[ $1 != plan ]] || refuse "plan: imagines its ranks and needs none. Run marlhf plan."
if [[ $1 == doctor ]]; then
    restarts=0 # what it finds is the answer
else
    check=--check
    ! $dry_run || check=--print-config
    config=$(WORLD_SIZE=$((nodes * ranks)) "$python" -m marlhf_mega "$@" "$check") || exit
fi
tensor_size=$(awk '$1 == "tensor_size:" { print $2; exit }' <<<"$config")
choose_environment "$nodes" "${master%:*}" "$capability" "${tensor_size:-1}" "$exact"

if ((nodes == 1)); then
    rendezvous=(--standalone)
else
    [[ $master == *:* ]] || master=$master:29400
    # Said outright: guessing whether this machine is the master costs a minute and more, and the
    # others may not know its name.
    is_host=$( ((node_rank == 0)) && echo true || echo false)
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$master"
        --rdzv-id "$run_id" --rdzv-conf "is_host=$is_host,join_timeout=$join_seconds")
    address=$(address_of "${GLOO_SOCKET_IFNAME-}")
    [[ -z $address ]] || rendezvous+=(--local-addr "$address")
fi
# shellcheck disable=SC2054 # the commas belong to the values
command=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$ranks"
    --max-restarts "$restarts" --signals-to-handle SIGTERM,SIGHUP,SIGQUIT -m marlhf_mega "$@")

if $dry_run; then
    print_environment
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# torchrun takes every code but 0 for a fault and ends with 1 itself, so a run that must end for
# good leaves its code here and exits with 0.
MARLHF_EXIT_CODE_FILE=$(mktemp)
export MARLHF_EXIT_CODE_FILE
trap 'rm -f -- "$MARLHF_EXIT_CODE_FILE"' EXIT

# torchrun itself would kill the ranks soon after a signal, in the middle of a step: only the ranks
# hear of it, and torchrun ends when they do.
stop_requested=false
# shellcheck disable=SC2329 # these are called by the trap
{
    ranks_now() {
        cat "/proc/$launcher/task"/*/children 2>/dev/null || true
    }
    ask_ranks_to_stop() {
        local asked
        read -ra asked -d '' < <(ranks_now) || true
        ((${#asked[@]} == 0)) || kill -TERM "${asked[@]}" 2>/dev/null || true
        if ! $stop_requested; then
            stop_requested=true
            end_if_restarted ${asked[@]+"${asked[@]}"} &>/dev/null &
        fi
    }
    # Ranks that could not listen yet have died, and torchrun starts new ones: end it then.
    end_if_restarted() {
        local rank
        while sleep 0.5 && kill -0 "$launcher"; do
            for rank in $(ranks_now); do
                if [[ " $* " != *" $rank "* ]]; then
                    kill -TERM "$launcher"
                    return
                fi
            done
        done
    }
}
trap ask_ranks_to_stop TERM INT USR1
(
    trap '' USR1 # Slurm signals every process of a step; the ranks set a handler of their own
    exec "${command[@]}"
) &
launcher=$!
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break # else a signal ended the wait, not torchrun
done

recorded=$(<"$MARLHF_EXIT_CODE_FILE")
if [[ $recorded =~ ^[0-9]+$ ]]; then
    exit "$recorded"
fi
if $stop_requested && ((code)); then
    exit 75 # stopped before the ranks could listen: nothing was lost
fi
exit "$code"
