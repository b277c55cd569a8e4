"""Float32 matrix products on the CPU through oneDNN.

Torch passes them to MKL, which reaches less than half of oneDNN's rate on processors that it does
not recognise. For all other products, bfloat16 included, torch itself chooses the fastest library.
"""

import math

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 1 << 20
"""For smaller products, looking up oneDNN's kernel takes longer than it saves."""


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, without autograd.

    Args:
        left: [rows, inner], may be a transposed view.
        right: [inner, columns], may be a transposed view.
    """
    size = left.shape[0] * right.numel()
    if left.dtype != torch.float32 or left.device.type != "cpu" or size < MIN_MULTIPLICATIONS:
        return left @ right
    if not torch.backends.mkldnn.is_available():
        return left @ right
    left = _contiguous(left)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return product


def _contiguous(matrix: Tensor) -> Tensor:
    """Return the matrix, or a row-major copy of a transposed one, as oneDNN needs it.

    Torch would copy it on one thread. Split into groups of rows, it is copied on all of them.
    """
    group = math.gcd(len(matrix), 32)
    if matrix.is_contiguous() or group < 8 or torch.get_num_threads() == 1:
        return matrix
    copy = torch.empty(matrix.shape, dtype=matrix.dtype)
    copy.unflatten(0, (-1, group)).copy_(matrix.unflatten(0, (-1, group)))
    return copy
