"""The projections' product and its gradients, on a world of one rank."""

import pytest
import torch
import torch.distributed as dist

from marlhf_mega.parallel.linear import linear


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 2, 5, 7), (40, 8, 96, 128)])
@pytest.mark.parametrize("summed", [False, True])
def test_value_and_gradients_are_those_of_torch_in_float64(group, sizes, summed):
    seq, batch, size_in, size_out = sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(seq, batch, size_in, generator=generator).requires_grad_()
    weight = torch.randn(size_out, size_in, generator=generator).requires_grad_()
    pull = torch.randn(seq, batch, size_out, generator=generator)
    found = linear(hidden, weight, sum_over=group if summed else None)
    grads = torch.autograd.grad((found * pull).sum(), (hidden, weight))
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.nn.functional.linear(hidden64, weight64)
    wanted = torch.autograd.grad((expected * pull).sum(), (hidden64, weight64))
    for mine, other in zip((found, *grads), (expected, *wanted), strict=True):
        assert mine.shape == other.shape
        assert (mine.double() - other).abs().max() < 1e-5 * other.abs().max()


def test_frozen_sides_get_no_gradient():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    assert not linear(hidden, weight).requires_grad
    linear(hidden, weight.requires_grad_()).sum().backward()
    assert weight.grad.tolist() == [[2.0] * 3] * 4
    hidden.requires_grad_(), weight.requires_grad_(False)
    linear(hidden, weight).sum().backward()
    assert hidden.grad.tolist() == [[4.0] * 3] * 2
