"""One rank of a fake world: groups that do not communicate, tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh
from marlhf_mega.platform.meta_device import on_meta


@contextmanager
def fake_mesh(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Mesh]:
    """Act as one rank of a world of any size; collectives do nothing, dtype `auto` is bfloat16.

    The process must not have joined a world.

    Args:
        parallel: degrees of parallelism.
        rank: the rank to act as.
        world_size: number of ranks.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = create_mesh(parallel)
        with on_meta() as device:
            # As on a CPU, without Transformer Engine, which would put weights on a real GPU.
            here = replace(mesh.platform, name="cpu", device=device, default_dtype=torch.bfloat16)
            yield replace(mesh, platform=here)
    finally:
        destroy_mesh()
