"""Add random gradients up over all ranks: `exchange_ranks.py OUT SIZES`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.platform.cpu import collectives

PIECE = 10


def summed(size, rank, num_ranks, *, async_op):
    """Return this rank's shard of the sum, and what it has to be."""
    everyone = [
        torch.randn(size, generator=torch.Generator().manual_seed(seed))
        for seed in range(num_ranks)
    ]
    mine, group = everyone[rank].clone(), dist.group.WORLD
    shard = mine.chunk(num_ranks)[rank]
    with collectives.coalescing_manager(group, async_ops=async_op) as manager:
        collectives.reduce_scatter(
            shard, mine, op=dist.ReduceOp.SUM, group=group, async_op=async_op
        )
    if async_op:
        manager.wait()
    return shard, torch.stack(everyone).sum(0).chunk(num_ranks)[rank]


def main():
    out, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    collectives.PIECE = PIECE
    found = [
        [torch.equal(*summed(size, rank, num_ranks, async_op=async_op)) for size in sizes]
        for async_op in (False, True)
    ]
    everyone = [None] * num_ranks
    dist.all_gather_object(everyone, found)
    if rank == 0:
        out.write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
