"""What this process computes on: one CUDA device, or the CPU.

Every entry point calls `prepare()` once, before anything imports Megatron. Everything else asks
`current()`. This package is the only place that names torch.cuda.
"""

from marlhf_mega.platform.device import Platform, Support, current, prepare

__all__ = ["Platform", "Support", "current", "prepare"]
