"""Float32 matrix products on the CPU through oneDNN, or the library that is faster here.

Torch passes them to MKL, which reaches less than half of oneDNN's rate on processors that it does
not recognise, and more than oneDNN's on some that it does. For all other products, bfloat16
included, torch itself chooses the fastest library.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 1 << 20
"""For smaller products, looking up oneDNN's kernel takes longer than it saves."""

Library = Literal["onednn", "torch"]
ProductKind = Literal["forward", "input_gradient", "weight_gradient", "decode"]
"""What is multiplied in which memory order; `decode`: few rows by a weight that may be packed."""
PRODUCTS: tuple[ProductKind, ...] = get_args(ProductKind)

MARGIN = 1.15
"""Where torch's own library is faster by less, oneDNN stays: noise decides nothing."""
_ROUNDS = 5
_ROWS, _FEW_ROWS, _WIDEST = 128, 8, 512

_libraries: dict[ProductKind, Library] = dict.fromkeys(PRODUCTS, "onednn")


def use(libraries: Mapping[ProductKind, Library]) -> None:
    """Choose the library for each kind of product, in this process and from now on."""
    _libraries.update(libraries)


def library_of(kind: ProductKind) -> Library:
    """Return the library in use; torch's own in a torch without oneDNN."""
    return _libraries[kind] if torch.backends.mkldnn.is_available() else "torch"


def measured(inner: int, columns: int) -> dict[ProductKind, float]:
    """Return by how much torch's own library is faster than oneDNN: above 1, it is.

    Takes some tens of milliseconds: the least times of five rounds, of both in turn.

    Args:
        inner: a typical width of the model; larger ones are cut.
        columns: likewise.
    """
    inner, columns = min(inner, _WIDEST), min(columns, _WIDEST)
    weight, few = torch.ones(columns, inner), torch.ones(_FEW_ROWS, inner)
    hidden, grad = torch.ones(_ROWS, inner), torch.ones(_ROWS, columns)
    factors: dict[ProductKind, tuple[Tensor, Tensor]] = {
        "forward": (hidden, weight.t()),
        "input_gradient": (grad, weight),
        "weight_gradient": (grad.t(), hidden),
    }
    packed = pack(weight, _FEW_ROWS)
    ratios: dict[ProductKind, float] = {
        "decode": _ratio(lambda: few @ weight.t(), lambda: packed(few, None))
    }
    for kind, (left, right) in factors.items():
        ratios[kind] = _ratio(partial(torch.matmul, left, right), partial(_onednn, left, right))
    return ratios


def faster(ratios: Mapping[ProductKind, float]) -> dict[ProductKind, Library]:
    """Return the library for each kind of product, from what `measured` returned."""
    return {kind: "torch" if ratio > MARGIN else "onednn" for kind, ratio in ratios.items()}


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, without autograd.

    Args:
        left: [rows, inner], may be a transposed view.
        right: [inner, columns], may be a transposed view.
    """
    size = left.shape[0] * right.numel()
    if left.dtype != torch.float32 or left.device.type != "cpu" or size < MIN_MULTIPLICATIONS:
        return left @ right
    if library_of(_kind(left, right)) == "torch":
        return left @ right
    return _onednn(left, right)


def pack(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return `F.linear` with a copy of this weight in oneDNN's own order.

    Args:
        weight: [out, in].
        rows: of the inputs that the order is chosen for; it serves any number of them.
    """
    onednn = torch.ops.mkldnn
    packed = onednn._reorder_linear_weight(weight.detach(), rows)
    return lambda hidden, bias: onednn._linear_pointwise(hidden, packed, bias, "none", [], "")


def _kind(left: Tensor, right: Tensor) -> ProductKind:
    if not left.is_contiguous():
        return "weight_gradient"
    return "input_gradient" if right.is_contiguous() else "forward"


def _ratio(torchs: Callable[[], Tensor], onednns: Callable[[], Tensor]) -> float:
    """Return the time of oneDNN's product over that of torch's own.

    On one thread it is processor time, which other work on the machine hardly changes.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    least = [math.inf, math.inf]
    for _ in range(_ROUNDS):
        for index, work in enumerate((torchs, onednns)):
            start = clock()
            work()
            least[index] = min(least[index], clock() - start)
    return least[1] / least[0]


def _onednn(left: Tensor, right: Tensor) -> Tensor:
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
