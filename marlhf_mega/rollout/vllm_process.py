"""A process that vLLM shares with us: what it reads of the environment, and what it changes."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy
import torch

from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform import current

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    # Ranks choose their threads themselves.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def import_vllm() -> Any:
    """Import vLLM, with what it reads from the environment set; the first time takes seconds."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import vllm

    # It warns of tokenizers, of which it needs none, and of weights that are computed.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    return vllm


@contextmanager
def unchanged_process(*, eager: bool) -> Iterator[None]:
    """Give random states and the choice of threads back as they were: vLLM changes both.

    With `eager` what it has marked for compilation is not compiled either.
    """
    states, here = (random.getstate(), numpy.random.get_state()), current()
    set_num_threads = torch.set_num_threads
    try:
        with (
            torch.random.fork_rng([here.device] if here.name == "cuda" else []),
            torch.compiler.set_stance("force_eager") if eager else nullcontext(),
        ):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_num_threads = set_num_threads


@contextmanager
def launched_as(mesh: Mesh) -> Iterator[None]:
    """Tell vLLM its place in this world: with ranks that only generate the launch has two."""
    before = dict(os.environ)
    for name, value in {"LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        os.environ.setdefault(name, str(value))  # without torchrun; the world is there already
    os.environ |= {"RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world_size)}
    try:
        yield
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def keep_to_gloo() -> None:
    """Keep engines on CPUs from shared memory.

    Its name is the same for all runs of a machine, a crash leaves it behind, and a rank whose peer
    has died waits in it for ever.
    """
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False
    make = parallel_state.init_model_parallel_group

    def without_queues(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"use_message_queue_broadcaster": False})

    parallel_state.init_model_parallel_group = without_queues
