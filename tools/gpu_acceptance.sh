#!/usr/bin/env bash
# What one GPU has to show: tests, golden vectors, rollout and train step of a 1B shape.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tools/gpu_acceptance.sh [--out FILE] [--dry-run]

Runs on one GPU, without network, in under 10 minutes, with the Python named by PYTHON
(default: python3), into which marlhf_mega is installed. Prints a table and one JSON object.
END
}

out=
dry_run=false
while (($#)); do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --out)
            out=${2:?--out needs a file}
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

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
shape=(--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --ffn 8192 --vocab 32000 --dtype bfloat16)
commands=(
    "$python -m pytest -q tests/gpu"
    "$python tools/benchmark/rollout.py ${shape[*]} --batch 64 --prompt-len 256 --response-len 128 --iters 3"
    "$python tools/benchmark/train_step.py ${shape[*]} --batch 16 --prompt-len 512 --response-len 512 --microbatches 4 --iters 5"
)
if $dry_run; then
    printf '%s\n' "${commands[@]}"
    exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_acceptance: needs a CUDA device; torch sees none. Run it on a GPU machine." >&2
    exit 2
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
results=$(mktemp -d)
trap 'rm -rf -- "$results"' EXIT
failed=0
for number in "${!commands[@]}"; do
    echo "== ${commands[number]}"
    begin=$SECONDS
    read -ra words <<<"${commands[number]}"
    "${words[@]}" >"$results/$number.out" 2>"$results/$number.err" || {
        failed=1
        tail -20 "$results/$number.out" "$results/$number.err"
    }
    tail -1 "$results/$number.out"
    echo "   $((SECONDS - begin)) s"
done
"$python" - "$results" "${out:-/dev/null}" <<'END'
import json
import pathlib
import sys

import torch

folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
result["tests"] = (folder / "0.out").read_text().strip().splitlines()[-1]
for number, name in ((1, "rollout"), (2, "train_step")):
    lines = (folder / f"{number}.out").read_text().strip().splitlines()
    result[name] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
for name in ("rollout", "train_step"):
    for key, value in (result[name] or {}).items():
        if isinstance(value, (int, float)):
            print(f"{name:12} {key:24} {value:,.4g}")
text = json.dumps(result)
print(text)
out.write_text(text + "\n")
END
exit $failed
