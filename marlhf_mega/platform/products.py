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
    if _is_transposed(left) and len(left) > right.shape[1]:
        # A transposed left operand is copied: of a product and its transpose, take the smaller.
        return _transposed(_product(right.t(), left.t()))
    return _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    rows = _transposed(left.t()) if _is_transposed(left) else left
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, right.t(), None, "none", [], "")
    return product


def _is_transposed(matrix: Tensor) -> bool:
    return not matrix.is_contiguous() and matrix.t().is_contiguous()


def _transposed(matrix: Tensor) -> Tensor:
    """Return a contiguous copy of matrix.t().

    Torch transposes on one thread. Cut into groups of rows, it is a copy like any other.
    """
    rows, columns = matrix.shape
    group = math.gcd(rows, 32)
    if torch.get_num_threads() == 1 or group < 8:
        return matrix.t().contiguous()
    copy = matrix.new_empty(columns, rows)
    copy.view(columns, -1, group).copy_(matrix.view(-1, group, columns).permute(2, 0, 1))
    return copy
