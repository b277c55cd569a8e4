#!/usr/bin/env bash
# SFT, reward model, macro-action PPO and evaluation on this machine, on built-in data.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [--dry-run] [ARGUMENT ...]

Creates .venv in the project's root if needed, then runs `marlhf quickstart` on 4 ranks (tensor
parallel 2 x pipeline parallel 2): on 4 GPUs if the machine has them, else on the CPU.

  --dry-run   print the command and its environment and run nothing
  --help      print this text
  ARGUMENT    passed to `marlhf quickstart`, for example run.dir=runs/mine

PYTHON=/path/to/python3.11 chooses the Python for .venv (default: the first Python >= 3.11 found).
Example: bash launch/quickstart.sh run.dir=runs/mine run.steps=20
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
ranks=4
dry_run=false
arguments=()
for argument in "$@"; do
    case $argument in
        --help | -h)
            usage
            exit 0
            ;;
        --dry-run) dry_run=true ;;
        *) arguments+=("$argument") ;;
    esac
done

# One thread per rank; more threads would compete for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# NCCL does not allow two ranks of a group on one GPU.
if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    if ((gpus > 0 && gpus < ranks)); then
        echo "found $gpus GPU(s), need $ranks: running on the CPU"
        export CUDA_VISIBLE_DEVICES=
    fi
fi

command=(-m torch.distributed.run --standalone --nproc-per-node "$ranks"
    -m marlhf_mega quickstart ${arguments[@]+"${arguments[@]}"})
if $dry_run; then
    echo "OMP_NUM_THREADS=$OMP_NUM_THREADS CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-<unset>}"
    printf '%q ' .venv/bin/python "${command[@]}"
    echo
    exit 0
fi

# shellcheck source=launch/venv.sh
source "$root/launch/venv.sh"
make_venv "$root"
# One process checks the configuration first: torchrun would bury a wrong key under its own output.
checked=$(WORLD_SIZE=$ranks "$VENV_PYTHON" -m marlhf_mega quickstart \
    ${arguments[@]+"${arguments[@]}"} --check) || exit
echo "$checked"
[[ $checked != "already complete"* ]] || exit 0
exec "$VENV_PYTHON" "${command[@]}"
