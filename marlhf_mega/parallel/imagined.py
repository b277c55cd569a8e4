"""One rank of a world that is not there: groups without messages, tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from marlhf_mega.config.schema import ParallelConfig
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh
from marlhf_mega.platform.imagined import on_meta


@contextmanager
def imagined_mesh(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Mesh]:
    """Stand on one rank of a world of any size; collectives change nothing, `auto` is bfloat16.

    The process must be in no world.

    Args:
        parallel: degrees.
        rank: whose place to take.
        world_size: number of ranks.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = create_mesh(parallel)
        with on_meta() as device:
            # Transformer Engine would put weights on a real GPU: its layers are left out.
            here = replace(mesh.platform, name="cpu", device=device, default_dtype=torch.bfloat16)
            yield replace(mesh, platform=here)
    finally:
        destroy_mesh()
