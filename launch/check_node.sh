#!/usr/bin/env bash
# Check whether this machine can run ranks; print one line and exit with 1 if not. Takes a second.
set -euo pipefail

unhealthy() {
    echo "$(hostname): $1" >&2
    exit 1
}

if command -v nvidia-smi >/dev/null; then
    gpus=$(timeout 60 nvidia-smi --list-gpus 2>&1) || unhealthy "nvidia-smi failed: ${gpus%%$'\n'*}"
    count=$(grep -c '^GPU' <<<"$gpus") || true
    if [[ -n ${SLURM_GPUS_ON_NODE-} ]] && ((count < SLURM_GPUS_ON_NODE)); then
        unhealthy "$count of $SLURM_GPUS_ON_NODE GPUs answer"
    fi
    # Uncorrectable errors since the driver was loaded: the GPU needs a reset or a replacement.
    errors=$(timeout 60 nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total \
        --format=csv,noheader 2>/dev/null | awk -F', *' '$2 ~ /^[0-9]+$/ && $2 > 0 { print $1 }') || errors=
    [[ -z $errors ]] || unhealthy "uncorrected memory errors on GPU ${errors//$'\n'/, }"
fi
shared=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1) || shared=
if [[ -n $shared ]] && ((shared < 65536)); then
    unhealthy "/dev/shm has $((shared / 1024)) MiB free; ranks need 64"
fi
