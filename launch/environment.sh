# Sourced by launch/torchrun.sh: environment variables for the GPUs and the configuration, each with
# its reason. A variable that is already set keeps its value, even if it is empty.
# shellcheck shell=bash

chosen=()

# Set and export $1=$2 unless the user has set it.
choose() {
    if [[ -z ${!1+set} ]]; then
        export "$1=$2"
    fi
    chosen+=("$1")
}

# Print the chosen variables, one NAME=value per line.
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

    # Otherwise a restart often finds the addresses of the previous processes, and hangs.
    choose TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
    # After a fault, other ranks can wait in a collective for the lost rank and ignore SIGTERM.
    choose TORCH_ELASTIC_SHUTDOWN_TIMEOUT 5
    # Ranks share the cores of a machine; more threads per rank would compete for them.
    choose OMP_NUM_THREADS 1

    # Gloo resolves the host name, which can give the wrong interface or none.
    if ((nodes == 1)); then
        choose GLOO_SOCKET_IFNAME lo
    else
        interface=$(interface_towards "$master")
        if [[ -n $interface ]]; then
            choose GLOO_SOCKET_IFNAME "$interface"
            # For NCCL's bootstrap only; its traffic uses InfiniBand where available.
            choose NCCL_SOCKET_IFNAME "$interface"
        fi
    fi

    if [[ -z $capability ]]; then
        return
    fi

    # Rollout and training alternate: fixed segments of one phase do not fit the other.
    if [[ -z ${PYTORCH_ALLOC_CONF+set} ]]; then
        choose PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
    fi
    # NCCL must not register the buffers of CUDA graphs, which lie in expandable segments.
    choose NCCL_GRAPH_REGISTER 0
    # NVLink SHARP allocates a buffer for each of the many process groups.
    choose NCCL_NVLS_ENABLE 0
    # Keep each rank's last collectives and dump them on a timeout, to see which rank was missing.
    choose TORCH_FR_BUFFER_SIZE 2000
    choose TORCH_NCCL_DUMP_ON_TIMEOUT 1
    # End the process when a peer is lost, without waiting for its communicators.
    choose TORCH_NCCL_ASYNC_ERROR_HANDLING 3

    if ((tensor_size > 1)); then
        # Before Blackwell, compute overlaps with tensor-parallel communication only if the device
        # runs kernels in launch order.
        if ((${capability%%.*} < 10)); then
            choose CUDA_DEVICE_MAX_CONNECTIONS 1
        fi
        # Otherwise norms occupy all multiprocessors and block concurrent communication.
        choose NVTE_FWD_LAYERNORM_SM_MARGIN 16
        choose NVTE_BWD_LAYERNORM_SM_MARGIN 16
    fi

    if $exact; then
        # Bit-exact runs: no atomic additions in attention, a fixed order for every sum.
        choose NVTE_ALLOW_NONDETERMINISTIC_ALGO 0
        choose NCCL_ALGO Ring
        choose CUBLAS_WORKSPACE_CONFIG :4096:8
    fi
}

# Print the network interface that holds the address of host $1 or routes to it, if known.
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

# Print the address of network interface $1, if known.
address_of() {
    command -v ip >/dev/null || return 0
    ip -o -4 addr show dev "$1" 2>/dev/null | awk 'NR == 1 { sub("/.*", "", $4); print $4 }' || true
}
