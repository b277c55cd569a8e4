"""Matrix products of the projections, with weights that a CPU can read faster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.parallel.mesh import Group
from marlhf_mega.platform.cpu.matmul import library_of, pack

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Maps an input [..., in] and a bias, or none, to [..., out]."""

FEW_ROWS = 32
"""Rows of a decode step, which the packed order is chosen for; it serves any number of them."""


def matrix_product(weight: Tensor) -> Product:
    """Return `F.linear` with this weight, on CPUs through a copy in oneDNN's own order.

    The copy takes as much memory as the weight and does not follow its changes. It pays where a
    weight is used many times for few rows: reading it in order is what such a product costs.

    Args:
        weight: [out, in].
    """
    if weight.device.type != "cpu" or not _onednn_takes(weight.dtype):
        return lambda rows, bias: F.linear(rows, weight, bias)
    return pack(weight, FEW_ROWS)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return dtype == torch.float32 and library_of("decode") == "onednn"


@contextmanager
def prepacked_projections(models: Sequence[Any]) -> Iterator[None]:
    """Let projections multiply by `matrix_product` of their weights as they are.

    Inside, weights must not change and there is no backward pass. On CPUs every rank holds its
    share of the projections, experts and heads twice for as long.

    Args:
        models: stage chunks, with their heads, or the decoders in them, without.
    """
    layers = [
        (layer, model.head_weight() if layer.weight is None else layer.weight)
        for model in models
        for layer in model.modules()
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear)
    ]
    try:
        for layer, weight in layers:
            if weight.device.type == "cpu":
                layer._forward_impl = _without_backward(matrix_product(weight))
        yield
    finally:
        for layer, _ in layers:
            vars(layer).pop("_forward_impl", None)


def _without_backward(product: Product) -> Callable[..., Tensor]:
    """Take the arguments of Megatron's own product, most of which are about gradients."""

    def forward(
        *,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sequence_parallel: bool = False,
        tp_group: Group | None = None,
        **_: object,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        return product(input, bias)

    return forward
