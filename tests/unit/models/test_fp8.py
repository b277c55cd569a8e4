"""FP8 off and on again in a built model, and the exact values of quantised weights."""

import pytest
import torch

from marlhf_mega.models.fp8 import exact_value, round_weights, switch_off, without_fp8
from marlhf_mega.models.spec import TransformerConfig


class Layer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inner = torch.nn.Module()
        self.inner.config = config


def model():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.fp8 = "hybrid"
    return Layer(config), config


def leave_by_an_error(layer, config):
    with without_fp8([layer]):
        assert config.fp8 is None
        raise KeyError


def test_a_block_without_fp8_ends_with_it_again_even_after_an_error():
    layer, config = model()
    with pytest.raises(KeyError):
        leave_by_an_error(layer, config)
    assert config.fp8 == "hybrid"


def test_switched_off_it_stays_off():
    layer, config = model()
    switch_off([layer])
    with without_fp8([layer]):
        pass
    assert config.fp8 is None


def test_weights_are_rounded_from_the_exact_values_that_stand_beside_them():
    layer = torch.nn.Linear(2, 1)
    exact = torch.tensor([[1.5, -2.5]])
    layer.weight.get_high_precision_init_val = lambda: exact
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(3.0)
    assert exact_value(layer.weight) is exact
    assert exact_value(layer.bias) is layer.bias
    round_weights([layer])
    assert layer.weight.tolist() == exact.tolist()
    assert layer.bias.tolist() == [3.0]
