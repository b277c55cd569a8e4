"""The product of a projection with its weight shard, and its gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.parallel.mesh import Group
from marlhf_mega.platform.products import matmul


def linear(rows: Tensor, weight: Tensor, *, sum_over: Group | None = None) -> Tensor:
    """Return rows @ weight.T with `platform.products` in both directions.

    Args:
        rows: [..., in].
        weight: [out, in].
        sum_over: ranks that hold other rows of the weight: the gradient of `rows` is summed over
            them, while the weight's is computed. None: the caller sees to it.

    Returns:
        [..., out].
    """
    product: Tensor = _Linear.apply(rows, weight, sum_over)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sum_over: Group | None) -> Tensor:
        # A frozen weight needs no rows in backward.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.sum_over = sum_over
        return matmul(rows.flatten(0, -2), weight.t()).unflatten(0, rows.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_rows = grad_weight = handle = None
        if ctx.needs_input_grad[0]:
            grad_rows = matmul(flat, weight)
            if ctx.sum_over is not None and ctx.sum_over.size() > 1:
                handle = dist.all_reduce(grad_rows, group=ctx.sum_over, async_op=True)
            grad_rows = grad_rows.unflatten(0, grad.shape[:-1])
        if rows is not None:
            grad_weight = matmul(flat.t(), rows.flatten(0, -2))
        if handle is not None:
            handle.wait()
        return grad_rows, grad_weight, None
