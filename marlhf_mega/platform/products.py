"""Float32 matrix products on the CPU through oneDNN.

Torch hands them to MKL, which reaches less than half of oneDNN's rate where it does not know the
processor (measured on AMD Zen 5, one thread: 95 against 210 GFLOP/s). Everything else, bfloat16
included, torch itself gives to the fastest library there is.
"""

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 1 << 20
"""Below, looking up oneDNN's kernel costs more than a faster one gains."""


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, outside of autograd.

    Args:
        left: [rows, inner]; either may be a transposed view.
        right: [inner, columns].
    """
    size = left.shape[0] * right.numel()
    if left.dtype != torch.float32 or left.device.type != "cpu" or size < MIN_MULTIPLICATIONS:
        return left @ right
    if not torch.backends.mkldnn.is_available():
        return left @ right
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return product
