"""Rotary frequencies and angles against numbers worked by hand."""

import math

import pytest
import torch

from marlhf_mega.config.model import ModelConfig, RopeScaling
from marlhf_mega.models.rope import inverse_frequencies, rotation_angles


def speeds(theta=10000.0, head_dim=8, **scaling):
    model = ModelConfig(
        head_dim=head_dim, rope_theta=theta, rope_scaling=RopeScaling(**scaling), vocab_size=10
    )
    return inverse_frequencies(model).tolist()


def test_plain_frequencies_are_powers_of_the_base():
    assert speeds() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert speeds(theta=1e6, head_dim=4) == pytest.approx([1, 0.001])


def test_the_head_width_is_that_of_the_model_unless_it_is_set():
    model = ModelConfig(hidden_size=32, num_attention_heads=4, vocab_size=10)
    assert inverse_frequencies(model).shape == (4,)


def test_linear_scaling_divides_every_frequency():
    assert speeds(kind="linear", factor=4) == pytest.approx([0.25, 0.025, 0.0025, 0.00025])


def test_llama3_scaling_divides_low_frequencies_keeps_high_ones_and_interpolates_between():
    # With theta = 1e6 and 4 pairs the wavelengths are 2 pi times 1, 31.6, 1000 and 31623:
    # 6.28, 199, 6283 and 198692. Below 8192 / 4 = 2048 a frequency stays, above 8192 it is
    # divided by 8. 6283 lies between: 8192 / 6283.185 = 1.303797 turns, a third of the way
    # (1.303797 - 1) / (4 - 1) = 0.101266 from divided to kept.
    kept = 0.101266
    expected = [1, 10**-1.5, 0.001 * (kept + (1 - kept) / 8), 10**-4.5 / 8]
    found = speeds(theta=1e6, kind="llama3", factor=8, original_max_positions=8192)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_bounds_of_llama3_scaling_are_settings():
    # One turn in the original context is now the upper bound: everything above it is kept.
    found = speeds(
        theta=1e6,
        kind="llama3",
        factor=8,
        original_max_positions=8192,
        low_freq_factor=0.5,
        high_freq_factor=1.0,
    )
    assert found == pytest.approx([1, 10**-1.5, 0.001, 10**-4.5 / 8], rel=1e-5)


def test_both_halves_of_a_head_turn_by_position_times_speed():
    angles = rotation_angles(torch.tensor([1.0, 0.5]), torch.tensor([[0, 1], [2, 3]]))
    assert angles.shape == (2, 2, 4)
    assert angles[1].tolist() == [[2, 1, 2, 1], [3, 1.5, 3, 1.5]]


def test_angles_far_into_a_long_context_stay_exact():
    # 100000 radians in float32 are off by at most half a unit in the last place.
    angle = rotation_angles(torch.tensor([1.0]), torch.tensor([100_000]))[0, 0].item()
    assert math.cos(angle) == pytest.approx(math.cos(100_000), abs=1e-6)
