"""The product of activations with a projection's weight shard, and its gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.parallel.mesh import Group
from marlhf_mega.platform.cpu.matmul import matmul


def linear(hidden: Tensor, weight: Tensor, *, sum_over: Group | None = None) -> Tensor:
    """Return hidden @ weight.T, with `platform.cpu.matmul` in the forward and backward pass.

    Args:
        hidden: [..., in].
        weight: [out, in], this rank's shard.
        sum_over: ranks over which the gradient of `hidden` is summed, while the weight's is
            computed. None means that the caller sums it.

    Returns:
        [..., out].
    """
    product: Tensor = _Linear.apply(hidden, weight, sum_over)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, sum_over: Group | None) -> Tensor:
        # The gradient of a frozen weight is not computed, so its input need not be kept.
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        ctx.sum_over = sum_over
        return matmul(hidden.flatten(0, -2), weight.t()).unflatten(0, hidden.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_hidden = grad_weight = handle = None
        if ctx.needs_input_grad[0]:
            grad_hidden = matmul(flat, weight)
            if ctx.sum_over is not None and ctx.sum_over.size() > 1:
                handle = dist.all_reduce(grad_hidden, group=ctx.sum_over, async_op=True)
            grad_hidden = grad_hidden.unflatten(0, grad.shape[:-1])
        if hidden is not None:
            grad_weight = matmul(flat.t(), hidden.flatten(0, -2))
        if handle is not None:
            handle.wait()
        return grad_hidden, grad_weight, None
