"""Megatron's small functions without torch's compiler, on any device.

It would compile them at their first call, for seconds, and again for other lengths. SwiGLU, the
only one that is used, keeps its input alone for the backward pass; autograd would keep as much
again.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.platform.patches import MEGATRON, PatchOnImport


def replace_compiled() -> None:
    """Put these functions in the place of Megatron's, in what is imported and what will be."""
    _patches.install()


def swiglu(halves: Tensor) -> Tensor:
    """Return silu(gate) * up for [..., gate and up], concatenated along the last dim."""
    gate, up = halves.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_back(grad: Tensor, halves: Tensor) -> Tensor:
    """Return the gradient of `swiglu` with respect to its input."""
    gate, up = halves.chunk(2, -1)
    result = torch.empty_like(halves)
    grad_gate, grad_up = result.chunk(2, -1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return result


def _patch(module: ModuleType) -> None:
    match module.__name__.removeprefix(MEGATRON + "."):
        case "jit":
            # Modules bind this name when they are imported.
            vars(module)["jit_fuser"] = module.noop_decorator
        case "fusions.fused_bias_swiglu":
            vars(module).update(swiglu=swiglu, swiglu_back=swiglu_back)


_patches = PatchOnImport(_patch)
