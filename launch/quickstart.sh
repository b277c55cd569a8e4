#!/usr/bin/env bash
# SFT -> reward model -> macro-action PPO -> evaluation on this machine, on built-in data.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [--dry-run] [ARGUMENT ...]

Makes .venv in the project's root if it is not there, then runs `marlhf quickstart` on 4 ranks
(tensor parallel 2 x pipeline parallel 2): on 4 GPUs where there are as many, else on the CPU.

  --dry-run   print the command and its environment, run nothing
  --help      this text
  ARGUMENT    passed on to `marlhf quickstart`, such as run.dir=runs/mine

PYTHON=/path/to/python3.11 chooses the Python that .venv is made from.
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

# One thread per rank: more would fight over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One GPU cannot hold two ranks of one NCCL group.
if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    if ((gpus > 0 && gpus < ranks)); then
        echo "$gpus GPU(s) found, $ranks are needed: running on the CPU"
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
# One process reads the configuration first: torchrun would wrap a wrong key in a page of its own.
WORLD_SIZE=$ranks "$VENV_PYTHON" -m marlhf_mega quickstart ${arguments[@]+"${arguments[@]}"} \
    --check >/dev/null || exit
exec "$VENV_PYTHON" "${command[@]}"
