"""Counter-based random numbers: a draw depends on its keys, not on which rank draws or when."""

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # the two multipliers of the splitmix64 finaliser
_MIX_2 = -7723592293110705685


def fold(*keys: int | Tensor) -> Tensor:
    """Mix integer keys into one 64-bit key (splitmix64 after each key).

    Args:
        keys: integers, or int64 tensors that broadcast against each other.

    Returns:
        int64 tensor of the broadcast shape.
    """
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        key = key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64)
        # One number on the host adds to tensors on any device.
        state = _mix(key + state + _GOLDEN)
    return state


def uniform(key: Tensor) -> Tensor:
    """Map keys from `fold` to float64 numbers in [0, 1), 53 bits each; same shape."""
    return ((key >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def normal(key: Tensor) -> Tensor:
    """Map keys from `fold` to normal numbers, float32, by Box-Muller on the two halves of each."""
    high = ((key >> 32) & 0xFFFFFFFF).to(torch.float64)
    low = (key & 0xFFFFFFFF).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((high + 1) / 2**32))
    return (radius * torch.cos(low * (2 * math.pi / 2**32))).to(torch.float32)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift logically; torch's own shift keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
