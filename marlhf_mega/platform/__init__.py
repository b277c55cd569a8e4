"""What this process computes on: one CUDA device, or the CPU.

Every entry point calls `prepare()` before anything imports Megatron; other code calls `current()`.
No other package uses torch.cuda.
"""

from marlhf_mega.platform.device import (
    Platform,
    Support,
    current,
    local_rank,
    prepare,
    world_size,
)

__all__ = ["Platform", "Support", "current", "local_rank", "prepare", "world_size"]
