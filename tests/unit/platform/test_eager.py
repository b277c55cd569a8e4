"""The gated product against autograd, and that Megatron calls it and compiles nothing."""

import torch
from torch.nn import functional as F

from marlhf_mega.platform import prepare
from marlhf_mega.platform.eager import swiglu, swiglu_back


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_gated_product_and_its_gradient_are_those_of_autograd():
    halves = draw(3, 2, 10, seed=0).requires_grad_()
    gate, up = halves.chunk(2, -1)
    product = F.silu(gate) * up
    assert torch.equal(swiglu(halves.detach()), product)
    pull = draw(*product.shape, seed=1)
    (expected,) = torch.autograd.grad(product, halves, pull)
    assert torch.allclose(swiglu_back(pull, halves.detach()), expected, atol=1e-12)


def test_megatron_calls_them_and_keeps_the_input_alone():
    prepare()
    from megatron.core import jit
    from megatron.core.fusions import fused_bias_swiglu

    assert jit.jit_fuser is jit.noop_decorator
    assert fused_bias_swiglu.swiglu is swiglu
    assert fused_bias_swiglu.swiglu_back is swiglu_back
    halves, kept = draw(3, 2, 10, seed=2).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        product = fused_bias_swiglu.bias_swiglu_impl(halves, None)
    assert sum(tensor.numel() for tensor in kept) == halves.numel()
    pull = draw(3, 2, 5, seed=3)
    (found,) = torch.autograd.grad(product, halves, pull)
    assert torch.equal(found, swiglu_back(pull, halves.detach()))
