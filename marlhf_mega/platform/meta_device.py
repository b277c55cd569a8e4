"""Let Megatron allocate on the meta device, where tensors have shapes but no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from marlhf_mega.platform.cpu import shim


@contextmanager
def on_meta() -> Iterator[torch.device]:
    """Allocate everything on the meta device, in Megatron's code as well as in ours."""
    meta = torch.device("meta")
    cuda: Any = shim.cuda_of_megatron() if shim.installed() else torch.cuda
    before = cuda.current_device, torch.Tensor.type
    cuda.current_device = lambda: meta
    # Megatron's optimizers look for 'torch.cuda.FloatTensor' by name.
    torch.Tensor.type = shim.tensor_type  # type: ignore[assignment, method-assign]
    try:
        with meta:
            yield meta
    finally:
        cuda.current_device, torch.Tensor.type = before  # type: ignore[method-assign]
