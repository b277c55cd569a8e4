"""The norm and the attention against their formulas, written out in float64."""

import math

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.models.layers import RMSNorm, SdpaAttention, causal_mask
from marlhf_mega.models.spec import AttnMaskType, TransformerConfig, transformer_config
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

# isort: split
from megatron.core.transformer.utils import is_layer_window_attention


def config(**changes):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    return TransformerConfig(**sizes | {"use_cpu_initialization": True} | changes)


def norm_with(weight, *, zero_centered=False, dtype=torch.float32, eps=1e-5):
    settings = config(layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype)
    norm = RMSNorm(settings, len(weight), eps=eps)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    return norm


def test_rms_norm_worked_by_hand():
    # The mean square of (1, 7) is 25, so with eps = 0 the normed row is (0.2, 1.4).
    row = torch.tensor([[1.0, 7.0]])
    assert norm_with([2.0, 3.0], eps=0.0)(row).tolist() == [pytest.approx([0.4, 4.2])]
    centred = norm_with([2.0, 3.0], zero_centered=True, eps=0.0)
    assert centred(row).tolist() == [pytest.approx([0.6, 5.6])]
    # eps = 11 makes the root 6.
    assert norm_with([1.0, 1.0], eps=11.0)(row).tolist() == [pytest.approx([1 / 6, 7 / 6])]


def test_a_new_norm_is_the_plain_norm_in_both_forms():
    for centred in (False, True):
        norm = RMSNorm(config(layernorm_zero_centered_gamma=centred), 2, eps=0.0)
        assert norm(torch.tensor([1.0, 7.0])).tolist() == pytest.approx([0.2, 1.4])


def as_bfloat16(number):
    """Round a float to 8 significant bits, ties to even."""
    if number == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(number)))
    unit = 2.0 ** (exponent - 7)
    return round(number / unit) * unit


@pytest.mark.parametrize("zero_centered", [False, True])
def test_bfloat16_is_normed_in_float32_and_rounded_where_each_family_rounds(zero_centered):
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(64, generator=generator).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    norm = norm_with(weight.tolist(), zero_centered=zero_centered, dtype=torch.bfloat16)
    root = math.sqrt(sum(x * x for x in row.tolist()) / 64 + 1e-5)
    normed = [x / root for x in row.tolist()]
    if zero_centered:  # Gemma: (x (1 + w)) rounded once
        expected = [as_bfloat16(x * (1 + w)) for x, w in zip(normed, weight.tolist(), strict=True)]
    else:  # Llama: round(x) w, rounded again
        expected = [
            as_bfloat16(as_bfloat16(x) * w) for x, w in zip(normed, weight.tolist(), strict=True)
        ]
    found = norm(row)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == expected
    once = [as_bfloat16(x * w) for x, w in zip(normed, weight.tolist(), strict=True)]
    assert expected != once


def test_the_gradient_of_the_norm_is_that_of_the_formula():
    norm = norm_with([0.5, -1.0, 2.0], zero_centered=True)
    row = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    pull = torch.tensor([1.0, -2.0, 0.5])
    (norm(row) * pull).sum().backward()
    x, w = row.detach().double(), norm.weight.detach().double()
    x.requires_grad_(), w.requires_grad_()
    formula = x / (x.square().mean() + 1e-5).sqrt() * (1 + w)
    (formula * pull).sum().backward()
    assert torch.allclose(row.grad.double(), x.grad, atol=1e-6)
    assert torch.allclose(norm.weight.grad.double(), w.grad, atol=1e-6)


SEQ, BATCH, HEADS, WIDTH = 7, 2, 4, 8


def naive_attention(query, key, value, *, scale, softcap, window):
    """One query, one head at a time, in float64."""
    out = torch.zeros(SEQ, BATCH, query.shape[2], WIDTH, dtype=torch.float64)
    shared = query.shape[2] // key.shape[2]
    for b in range(BATCH):
        for head in range(query.shape[2]):
            group = head // shared
            for i in range(SEQ):
                first = 0 if window is None else max(0, i - window + 1)
                scores = (key[first : i + 1, b, group] @ query[i, b, head]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / scores.exp().sum()
                out[i, b, head] = weights @ value[first : i + 1, b, group]
    return out.flatten(2)


def attention_of(groups, *, layer=1, **options):
    settings = config(num_query_groups=groups)
    return SdpaAttention(settings, layer, AttnMaskType.causal, **options)


def inputs(groups):
    generator = torch.Generator().manual_seed(1)
    shapes = [(SEQ, BATCH, heads, WIDTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator) * 2 for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, SEQ, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_that_of_the_naive_loop_with_its_gradient(groups, window, softcap):
    tensors = inputs(groups)
    doubles = [x.double().requires_grad_() for x in tensors]
    singles = [x.requires_grad_() for x in tensors]
    wanted = naive_attention(*doubles, scale=WIDTH**-0.5, softcap=softcap, window=window)
    found = attention_of(groups, softcap=softcap, window=window)(*singles)
    assert torch.allclose(found.double(), wanted, atol=2e-6)
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    wanted.mul(pull).sum().backward()
    found.mul(pull).sum().backward()
    for single, double in zip(singles, doubles, strict=True):
        assert torch.allclose(single.grad.double(), double.grad, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_scale_is_configurable(softcap):
    tensors = inputs(2)
    doubles = [x.double() for x in tensors]
    wanted = naive_attention(*doubles, scale=0.1, softcap=softcap, window=None)
    found = attention_of(2, softmax_scale=0.1, softcap=softcap)(*tensors)
    assert torch.allclose(found.double(), wanted, atol=2e-6)


def test_every_nth_layer_has_a_sliding_window_starting_with_the_first():
    windows = [attention_of(2, layer=n, window=3, window_every=2).window for n in (1, 2, 3, 4)]
    assert windows == [3, None, 3, None]
    assert attention_of(2, layer=2, window=3).window == 3


@pytest.mark.parametrize("every", [1, 2, 3])
def test_megatron_has_sliding_windows_in_the_same_layers(every):
    settings = Config.model_validate(
        {"model": {"num_layers": 6, "sliding_window": 3, "sliding_window_every": every}}
    )
    mesh = create_mesh(settings.parallel)
    theirs = transformer_config(settings.model, settings.precision, mesh, settings.memory)
    destroy_mesh()
    for layer in range(1, 7):
        slides = is_layer_window_attention(theirs.window_size, theirs.window_attn_skip_freq, layer)
        ours = attention_of(2, layer=layer, window=3, window_every=every).window
        assert slides == (ours is not None), layer


def test_the_mask_of_the_last_queries():
    options = {"device": torch.device("cpu"), "num_queries": 2}
    assert causal_mask(4, window=None, **options).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(4, window=2, **options).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_causal_mask():
    assert causal_mask(3, window=None, device=torch.device("cpu")).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]
    assert causal_mask(3, window=2, device=torch.device("cpu")).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 1],
    ]
