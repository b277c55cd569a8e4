# Sourced by launch/quickstart.sh and tests/run.sh: the project's own Python environment.
# shellcheck shell=bash

# Print the first Python that is new enough; PYTHON=... names another one.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "python3: must be 3.11 or newer; none was found. Install one or set PYTHON=/path/to/it." >&2
    return 1
}

# Make $1/.venv or bring it up to date, and set VENV_PYTHON. It is touched only if its Python is
# broken, or pyproject.toml or the constraints have changed since the last time.
make_venv() {
    local root=$1 python wanted
    local stamp="$root/.venv/installed.sha256"
    VENV_PYTHON="$root/.venv/bin/python"
    wanted=$(cat "$root/pyproject.toml" "$root/.ci/constraints.txt" | sha256sum)
    if "$VENV_PYTHON" -c '' 2>/dev/null; then
        if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
            return
        fi
    else
        python=$(find_python)
        echo "Making $root/.venv (once; this downloads PyTorch)"
        "$python" -m venv --clear "$root/.venv"
    fi
    echo "Installing marlhf_mega and what it needs into $root/.venv"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/.ci/constraints.txt" --editable "${root}[dev]"
    echo "$wanted" >"$stamp"
}
