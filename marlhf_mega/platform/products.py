"""Float32 matrix products on the CPU through oneDNN.

Torch hands them to MKL, which reaches less than half of oneDNN's rate where it does not know the
processor (measured on AMD Zen 5, one thread: 95 against 210 GFLOP/s). Everything else, bfloat16
included, torch itself gives to the fastest library there is.
"""

import math

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
    rows = _contiguous(left)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, right.t(), None, "none", [], "")
    return product


def _contiguous(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy if it is a transposed one: oneDNN needs it in rows.

    Torch, which would copy it otherwise, keeps one thread busy with it. Cut into groups of rows,
    it is a copy like any other.
    """
    group = math.gcd(len(matrix), 32)
    if matrix.is_contiguous() or group < 8 or torch.get_num_threads() == 1:
        return matrix
    copy = torch.empty(matrix.shape, dtype=matrix.dtype)
    copy.unflatten(0, (-1, group)).copy_(matrix.unflatten(0, (-1, group)))
    return copy
