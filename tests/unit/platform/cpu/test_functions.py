"""Replaced Megatron functions against complex rotation, autograd and a float64 norm."""

import pytest
import torch

from marlhf_mega.platform import prepare
from marlhf_mega.platform.cpu.functions import l2_norm, rotate_halves


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def never(*args, **kwargs):
    raise AssertionError("Megatron's own was called")


def test_rotation_multiplies_complex_numbers_and_gradients_by_the_conjugate():
    heads, angles = draw(5, 2, 3, 8, seed=0).requires_grad_(), draw(5, 1, 1, 4, seed=1)
    rotate = rotate_halves(never)
    rotated = rotate(heads, torch.cat((angles, angles), -1), multi_latent_attention=False)

    def as_complex(x):
        return torch.complex(*x.chunk(2, -1))

    turns = torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(as_complex(rotated), as_complex(heads) * turns, atol=1e-12)
    pull = draw(*rotated.shape, seed=2)
    (grad,) = torch.autograd.grad(rotated, heads, pull)
    assert torch.allclose(as_complex(grad), as_complex(pull) * turns.conj(), atol=1e-12)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (6, {}),
        (8, {"rotary_interleaved": True}),
        (8, {"mscale": 1.5}),
        (8, {"multi_latent_attention": True}),
    ],
)
def test_other_rotations_are_left_to_megatron(width, options):
    def original(heads, angles, rotary_interleaved=False, *, mscale, **others):
        given = {"rotary_interleaved": rotary_interleaved, "mscale": mscale} | others
        assert given == {"rotary_interleaved": False, "mscale": 1.0} | options
        return heads

    heads = draw(2, 1, 1, 8, seed=0)
    assert rotate_halves(original)(heads, draw(2, 1, 1, width, seed=1), **options) is heads


def test_megatron_calls_them():
    prepare()
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads

    assert clip_grads.l2_norm_impl is l2_norm
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    assert rotate.__wrapped__.__module__ == rope_utils.__name__
    assert rotate.__code__ is rotate_halves(never).__code__


def test_norm_of_several_tensors():
    assert l2_norm(0, None, [[torch.tensor([[3.0]]), torch.tensor([0.0, 4.0])]], False)[0] == 5.0
    parts = [draw(300, 70, seed=k).float() for k in range(3)]
    expected = torch.cat(parts).double().norm().item()
    found, each = l2_norm(0, None, [parts], False)
    assert found.shape == (1,)
    assert each is None
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert l2_norm(0, None, [[torch.tensor([1.0, torch.inf])]], False)[0].isinf()
    # A single float32 sum of so many squares would be 1e-4 off.
    long = draw(10_000_000, seed=5).float()
    expected = long.double().norm().item()
    assert l2_norm(0, None, [[long]], False)[0].item() == pytest.approx(expected, rel=2e-6)
