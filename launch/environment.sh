# Sourced by launch/torchrun.sh: environment variables by architecture and config, each with its
# reason. A variable that is set already is left alone, even if it is empty.
# shellcheck shell=bash

chosen=()

# Set and export $1=$2 unless the user has set it.
choose() {
    if [[ -z ${!1+set} ]]; then
        export "$1=$2"
    fi
    chosen+=("$1")
}

# Print what was chosen, one NAME=value per line.
print_environment() {
    local name
    for name in ${chosen[@]+"${chosen[@]}"}; do
        echo "$name=${!name}"
    done
}

# choose_environment NODES MASTER CAPABILITY TENSOR_SIZE EXACT
# CAPABILITY: the GPUs' compute capability such as 9.0, empty without GPUs. EXACT: true or false.
choose_environment() {
    local nodes=$1 master=$2 capability=$3 tensor_size=$4 exact=$5 interface

    # Without it a restart often meets the addresses of the processes before it, and hangs.
    choose TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
    # After a fault the other ranks may wait for the lost one deep in a collective, deaf to SIGTERM.
    choose TORCH_ELASTIC_SHUTDOWN_TIMEOUT 5
    # Ranks share the cores of a machine: more threads each would fight over them.
    choose OMP_NUM_THREADS 1

    # Gloo looks up the host's name for an address, which finds the wrong interface or none.
    if ((nodes == 1)); then
        choose GLOO_SOCKET_IFNAME lo
    else
        interface=$(interface_towards "$master")
        if [[ -n $interface ]]; then
            choose GLOO_SOCKET_IFNAME "$interface"
            # NCCL's first contact; the traffic itself uses InfiniBand where there is any.
            choose NCCL_SOCKET_IFNAME "$interface"
        fi
    fi

    if [[ -z $capability ]]; then
        return
    fi

    # Rollout and training alternate: whole segments of one phase do not fit the other.
    if [[ -z ${PYTORCH_ALLOC_CONF+set} ]]; then
        choose PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
    fi
    # One buffer for each of the many process groups; only NVLink SHARP's reductions need them.
    choose NCCL_NVLS_ENABLE 0
    # Events of the last collectives of every rank, written when one times out: who was missing.
    choose TORCH_FR_BUFFER_SIZE 2000
    choose TORCH_NCCL_DUMP_ON_TIMEOUT 1
    # A lost peer ends the process, without waiting for communicators that will never answer.
    choose TORCH_NCCL_ASYNC_ERROR_HANDLING 3

    if ((tensor_size > 1)); then
        # Before Blackwell a kernel of tensor parallelism overlaps with its communication only if
        # the device takes them in the order they were launched.
        if ((${capability%%.*} < 10)); then
            choose CUDA_DEVICE_MAX_CONNECTIONS 1
        fi
        # Norms would fill every multiprocessor and hold up the communication beside them.
        choose NVTE_FWD_LAYERNORM_SM_MARGIN 16
        choose NVTE_BWD_LAYERNORM_SM_MARGIN 16
    fi

    if $exact; then
        # The same bits every time: no atomic additions in attention, one order of every sum.
        choose NVTE_ALLOW_NONDETERMINISTIC_ALGO 0
        choose NCCL_ALGO Ring
        choose CUBLAS_WORKSPACE_CONFIG :4096:8
    fi
}

# Print the network interface that leads to host $1, or holds its address; nothing if unknown.
interface_towards() {
    local address
    command -v ip >/dev/null || return 0
    address=$(getent ahostsv4 "$1" 2>/dev/null | awk 'NR == 1 { print $1 }') || true
    [[ -n $address ]] || return 0
    ip -o -4 addr show 2>/dev/null | awk -v address="$address" '
        { split($4, parts, "/"); if (parts[1] == address) found = $2 }
        END { print found }' | grep . && return
    ip -o -4 route get "$address" 2>/dev/null |
        awk '{ for (i = 1; i < NF; i++) if ($i == "dev") print $(i + 1) }' || true
}

# Print the address of the network interface $1; nothing if unknown.
address_of() {
    command -v ip >/dev/null || return 0
    ip -o -4 addr show dev "$1" 2>/dev/null | awk 'NR == 1 { sub("/.*", "", $4); print $4 }' || true
}
