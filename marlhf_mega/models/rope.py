"""Rotary position frequencies (RoPE), with the scalings that the supported families use."""

import math

import torch
from torch import Tensor

from marlhf_mega.config.model import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Return the angle per position for every pair of head dims, float32 [head_dim / 2].

    The `llama3` scaling (Llama 3.1) divides low frequencies by the factor, keeps high ones, and
    interpolates in between.
    """
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float32) / model.kv_channels
    speeds = 1.0 / model.rope_theta**exponents
    scaling = model.rope_scaling
    match scaling.kind:
        case "none":
            return speeds
        case "linear":
            return speeds / scaling.factor
        case "llama3":
            turns = scaling.original_max_positions * speeds / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return kept * speeds + (1 - kept) * speeds / scaling.factor


def rotation_angles(speeds: Tensor, positions: Tensor) -> Tensor:
    """Return angles, float32 [*positions, head_dim], the same for both halves of a head."""
    angles = positions.to(torch.float32)[..., None] * speeds
    return torch.cat((angles, angles), dim=-1)
