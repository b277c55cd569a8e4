"""Small copies between host and device that hold neither of them up."""

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device) -> Tensor:
    """Return a tensor of Python numbers on a device; the host does not wait for the copy."""
    host = torch.tensor(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one device on the host, for which the host waits once."""
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    # The copies are in pinned memory, which is not to be kept.
    return [copy.clone() for copy in copies]
