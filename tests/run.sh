#!/usr/bin/env bash
# Makes the environment, then lints and runs all tests. Arguments go to pytest.
# --vllm: makes another one, with vLLM for CPUs, and runs the tests that need it.
# --with-vllm: both, one after the other.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
if [[ ${1-} == --with-vllm ]]; then
    plain=0
    bash tests/run.sh "${@:2}" || plain=$?
    bash tests/run.sh --vllm || exit
    exit "$plain"
fi
# shellcheck source=launch/venv.sh
source launch/venv.sh
# Tests start several ranks at once: one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Hundreds of processes import the package: each would compile it again.
unset PYTHONDONTWRITEBYTECODE

# Some tests measure memory and time of processes, which other work on a machine disturbs.
run_again() {
    echo "What failed is run once more, alone." >&2
    "$VENV_PYTHON" -m pytest --last-failed --last-failed-no-failures none --maxfail 3 -v "$@"
}

if [[ ${1-} == --vllm ]]; then
    make_vllm_venv "$root"
    files=(tests/vllm "tests/e2e/test_matrix.py::test_every_choice_trains[vllm]")
    tests=0
    "$VENV_PYTHON" -m pytest "${files[@]}" "${@:2}" || tests=$?
    if ((tests == 1)); then
        tests=0
        run_again "${files[@]}" "${@:2}" || tests=$?
    fi
    exit "$tests"
fi
make_venv "$root"
lint=0 tests=0
"$VENV_PYTHON" -m ruff check . || lint=$?

results=$(mktemp)
trap 'rm -f -- "$results"' EXIT
# A file stays on one worker, so that what its tests share is started once; conftest.py orders them.
"$VENV_PYTHON" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 \
    --junit-xml "$results" "$@" || tests=$?

# Nothing is written where pytest was used wrongly.
if [[ -s $results ]]; then
    "$VENV_PYTHON" - "$results" <<'END'
import sys
import xml.etree.ElementTree as ET

cases = ET.parse(sys.argv[1]).iter("testcase")
names = [f"{c.get('classname')}.{c.get('name')}" for c in cases if c.find("skipped") is not None]
gpu = sum("tests.gpu" in name for name in names)
print(f"GPU tests skipped: {gpu}; other tests skipped: {len(names) - gpu}")
END
fi
if ((tests == 1)); then
    tests=0
    run_again "$@" || tests=$?
fi
if ((lint)); then
    echo "ruff check failed, see the top" >&2
fi
exit $((tests ? tests : lint))
