"""What microbatches need to know of a rank."""

from types import SimpleNamespace

import torch


def mesh(num_stages):
    """A rank of an interleaved pipeline, which takes a multiple of its stages."""
    return SimpleNamespace(
        pp_size=num_stages,
        num_chunks=2 if num_stages > 1 else 1,
        ep_size=1,
        sequence_multiple=1,
        context_multiple=1,
        device=torch.device("cpu"),
    )
