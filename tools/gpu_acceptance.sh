#!/usr/bin/env bash
# Acceptance on one GPU: answers, and the speed of a policy of 1B shape.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tools/gpu_acceptance.sh [--out DIR] [--steps NAME...] [--wheels DIR] [--dry-run]

Six minutes at most on one GPU, without network. The steps, each within a time of its own:
  answers     a tiny model in float32 and bfloat16 against what a CPU says; offload and back
  decode      time, launches and waits of a decoded token, with and without CUDA graphs
  attention   torch's kernels, and their first call at widths that are new
  training    an optimizer step: MFU, longest kernels, log-prob head with chunks of three sizes
  copies      to host memory of each kind; recording a CUDA graph
  quickstart  SFT, reward model and PPO, packed, with CUDA graphs
  fp8         training step and quickstart in FP8, where Transformer Engine supports it

After every step DIR/acceptance.json has all that is known; what is printed goes to
DIR/acceptance.log. Needs 40 GiB of GPU memory.

  --out DIR       default: $OUT, else runs/acceptance
  --steps NAME... only these
  --wheels DIR    install the wheels in DIR first, into a folder that is deleted at the end
  --dry-run       every step on the CPU, with tiny sizes
  --help          print this text

PYTHON=/path/to/python chooses a Python (default: .venv's if it exists, else python3).
Exit codes: 0 all passed, 1 something failed, 2 wrong usage or no GPU.
Example: bash tools/gpu_acceptance.sh --out h100
END
}

out=${OUT:-runs/acceptance}
wheels='' dry_run='' steps=()
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --out | --wheels)
            if [[ -z ${2-} ]]; then
                echo "$1: needs a folder. See --help." >&2
                exit 2
            fi
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --steps)
            while [[ -n ${2-} && $2 != --* ]]; do
                steps+=("$2")
                shift
            done
            ;;
        --dry-run) dry_run=1 ;;
        *)
            echo "$1: unknown argument. See --help." >&2
            exit 2
            ;;
    esac
    shift
done
out=$(realpath -m -- "$out")
wheels=${wheels:+$(realpath -- "$wheels")}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
# Transformer Engine multiplies float32 matrices in TF32, with 10 bits, unless forbidden.
export NVIDIA_TF32_OVERRIDE=0
capability=''
if [[ -n $dry_run ]]; then
    export CUDA_VISIBLE_DEVICES=
else
    # One GPU and one rank, however many GPUs the machine has.
    first=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${first%%,*}
    if ! capability=$("$python" -c '
import torch
print(*torch.cuda.get_device_capability(), sep=".")' 2>/dev/null); then
        echo "gpu_acceptance: needs a CUDA device; $python sees none. Run it on a GPU machine." >&2
        exit 2
    fi
fi
if [[ -n $wheels ]]; then
    site=$(mktemp -d)
    trap 'rm -rf -- "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh
choose_environment 1 localhost "$capability" 1 false
"$python" tools/acceptance/driver.py --out "$out" ${dry_run:+--dry-run} ${steps:+--steps "${steps[@]}"}
