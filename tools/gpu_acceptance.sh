#!/usr/bin/env bash
# What one GPU has to show: tests, golden vectors, and the speed of a 1B-shaped policy.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tools/gpu_acceptance.sh [--out FILE] [--dry-run]

Runs on one GPU, without network, in under 10 minutes: tests/gpu, the golden vectors on the
device, rollout and train step of a 1B-shaped policy in bfloat16 and, where it can be used, FP8,
one small PPO iteration. Prints a table and one JSON object.

  --out FILE  also write the JSON object there
  --dry-run   print the commands, run nothing
  --help      this text

PYTHON=/path/to/python names a Python that marlhf_mega is installed into; default: .venv's, if
there is one, else python3. Needs about 40 GiB of GPU memory.
Exit codes: 0 all passed, 1 something failed, 2 wrong usage or no GPU.
END
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
out=/dev/null
dry_run=false
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --out)
            if [[ -z ${2-} ]]; then
                echo "--out: needs a file. See --help." >&2
                exit 2
            fi
            out=$2
            shift
            ;;
        --dry-run) dry_run=true ;;
        *)
            echo "$1: unknown argument. See --help." >&2
            exit 2
            ;;
    esac
    shift
done

if ! $dry_run && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_acceptance: needs a CUDA device; $python sees none. Run it on a GPU machine." >&2
    exit 2
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
# One GPU and one rank, whatever else is here.
first=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${first%%,*}
results=$(mktemp -d)
trap 'rm -rf -- "$results"' EXIT
failed=()

# step NAME SECONDS ARGUMENT...: run Python, keep what it prints, note its exit code and time.
step() {
    local name=$1 limit=$2 code=0 begin=$SECONDS
    shift 2
    if $dry_run; then
        printf '%q ' "$python" "$@"
        echo
        return
    fi
    echo "== $name: $*"
    timeout "$limit" "$python" "$@" >"$results/$name.out" 2>"$results/$name.err" || code=$?
    echo "$code $((SECONDS - begin))" >"$results/$name.code"
    if ((code)); then
        failed+=("$name")
        tail -n 30 "$results/$name.out" "$results/$name.err"
    fi
}

billion=(--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --ffn 8192 --vocab 32000 --dtype bfloat16)
# Most of their time they start programs, which one after the other would take too long.
step tests 240 -m pytest -q -n 4 tests/gpu
for group in ma_ppo alol; do
    step "golden_$group" 20 tools/check_golden.py "tests/golden/${group}_cases.json" --device cuda
done
formats=(off)
has_fp8='import sys
from marlhf_mega.platform import current
sys.exit(not current().supports_fp8())'
if $dry_run || "$python" -c "$has_fp8"; then
    formats+=(hybrid)
fi
for fp8 in "${formats[@]}"; do
    step "rollout_fp8_$fp8" 60 tools/benchmark/rollout.py "${billion[@]}" --fp8 "$fp8" \
        --batch 64 --prompt-len 256 --response-len 128 --warmup 1 --iters 3
    step "train_step_fp8_$fp8" 60 tools/benchmark/train_step.py "${billion[@]}" --fp8 "$fp8" \
        --batch 16 --prompt-len 512 --response-len 512 --microbatches 4 --warmup 2 --iters 5
done
step rollout_cuda_graphs 60 tools/benchmark/rollout.py "${billion[@]}" --cuda-graphs \
    --batch 64 --prompt-len 256 --response-len 128 --warmup 1 --iters 3
step ppo_step 60 tools/benchmark/ppo_step.py --dtype bfloat16 --warmup 1 --iters 3
if $dry_run; then
    exit 0
fi

"$python" - "$results" "$out" <<'END'
import datetime
import json
import pathlib
import sys

import torch

folder, out = map(pathlib.Path, sys.argv[1:])
result = {
    "date": datetime.date.today().isoformat(),
    "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "steps": {},
}
print(f"\n{result['device']}, torch {result['torch']}")
for code_file in sorted(folder.glob("*.code"), key=lambda file: file.stat().st_mtime):
    name = code_file.stem
    code, seconds = map(int, code_file.read_text().split())
    lines = (folder / f"{name}.out").read_text().strip().splitlines() or [""]
    step = {"passed": code == 0, "seconds": seconds}
    if code == 0 and lines[-1].startswith("{"):
        step["result"] = json.loads(lines.pop())
    step["lines"] = lines if "result" in step else lines[-1:]
    result["steps"][name] = step
    print(f"\n{name:16}{'passed' if code == 0 else f'FAILED ({code})':14}{seconds:4} s")
    for line in step["lines"]:
        print(f"    {line}")
result["passed"] = all(step["passed"] for step in result["steps"].values())
print()
text = json.dumps(result)
print(text)
out.write_text(text + "\n")
END
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
