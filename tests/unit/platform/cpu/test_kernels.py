"""The CPU kernels for norm and attention against autograd through their formulas in float64."""

import pytest
import torch

from marlhf_mega.platform.cpu.kernels import rms_norm, short_causal_attention


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same_with_gradients(found, expected, inputs):
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).double()
    assert torch.allclose(found, expected, atol=1e-12)
    grads = torch.autograd.grad(found, inputs, pull)
    wanted = torch.autograd.grad(expected, inputs, pull)
    for mine, other in zip(grads, wanted, strict=True):
        assert mine.shape == other.shape
        assert torch.allclose(mine, other, atol=1e-12)


def test_norm_and_its_gradients():
    hidden, weight = draw(3, 2, 5, seed=0), draw(5, seed=1)
    expected = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    assert_same_with_gradients(rms_norm(hidden, weight, 1e-3), expected, (hidden, weight))


def test_norm_in_bfloat16_rounds_as_the_families_do():
    hidden, weight = (draw(*shape, seed=4).bfloat16().detach() for shape in ((6, 64), (64,)))
    exact = hidden.double(), weight.double()
    rounded = torch.nn.functional.rms_norm(hidden.float(), (64,), None, 1e-5).bfloat16() * weight
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    kept = [x.detach().clone() for x in leaves]
    found = rms_norm(*leaves, 1e-5)
    with torch.no_grad():
        assert torch.equal(rms_norm(hidden, weight, 1e-5), found)
    assert (found - rounded).abs().max() <= 2**-7 * rounded.abs().max()
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    wanted = [x.requires_grad_() for x in exact]
    norm = torch.nn.functional.rms_norm(wanted[0], (64,), wanted[1], 1e-5)
    for mine, other in zip(
        torch.autograd.grad(found, leaves, pull),
        torch.autograd.grad(norm, wanted, pull.double()),
        strict=True,
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine - other).abs().max() <= 2**-6 * other.abs().max()
    assert all(map(torch.equal, leaves, kept))


def test_norm_of_a_frozen_weight_passes_the_gradient_on():
    hidden = draw(2, 4, seed=0)
    rms_norm(hidden, torch.ones(4, dtype=torch.float64), 0.0).sum().backward()
    assert hidden.grad is not None
    # Scaling a row changes nothing, so the gradient is orthogonal to it.
    assert torch.allclose((hidden * hidden.grad).sum(-1), torch.zeros(2).double(), atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_and_its_gradients(groups):
    query = draw(2, 4, 6, 3, seed=0)
    key, value = draw(2, groups, 6, 3, seed=1), draw(2, groups, 6, 3, seed=2)
    k, v = (x.repeat_interleave(4 // groups, 1) for x in (key, value))
    scores = (query @ k.transpose(2, 3)) * 0.7
    future = torch.ones(6, 6).triu(1).bool()
    expected = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    found = short_causal_attention(query, key, value, 0.7)
    assert_same_with_gradients(found, expected, (query, key, value))
