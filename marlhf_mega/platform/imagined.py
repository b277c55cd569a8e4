"""Memory that is not there: Megatron allocates on the meta device, which keeps shapes only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from marlhf_mega.platform import cpu_shim


@contextmanager
def on_meta() -> Iterator[torch.device]:
    """Send every allocation of ours and of Megatron's to the meta device."""
    meta = torch.device("meta")
    cuda: Any = cpu_shim.cuda_of_megatron() if cpu_shim.installed() else torch.cuda
    before = cuda.current_device, torch.Tensor.type
    cuda.current_device = lambda: meta
    # Megatron's optimizers ask for 'torch.cuda.FloatTensor' by name.
    torch.Tensor.type = cpu_shim.tensor_type  # type: ignore[assignment, method-assign]
    try:
        with meta:
            yield meta
    finally:
        cuda.current_device, torch.Tensor.type = before  # type: ignore[method-assign]
