"""Masked sums, moments and whitening.

Statistics take two steps, so that the caller can reduce over data-parallel ranks in between:
`masked_moments` returns sums, `mean_and_variance` turns the reduced sums into mean and variance.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum the entries where `mask` is True; the others may be anything, NaN included."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_moments(values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums, which add up over data-parallel ranks.

    Args:
        values: any shape.
        weights: same shape, bool mask or non-negative counts (e.g. tokens per macro action);
            values of weight 0 may be anything.

    Returns:
        [3] float64: sum of weights * values, sum of weights * values^2, sum of weights.
    """
    wide = torch.where(weights > 0, values, 0.0).double()
    weights = weights.double()
    weighted = weights * wide
    return torch.stack((weighted.sum(), (weighted * wide).sum(), weights.sum()))


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and unbiased variance from (reduced) `masked_moments`.

    Args:
        moments: [3] float64 from `masked_moments`, possibly summed over ranks.

    Returns:
        mean and variance, float64 scalars; both 0 without entries, variance 0 with a single one.
    """
    total, square_total, count = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = (square_total - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    return mean, variance


def whiten(values: Tensor, mask: Tensor, *, mean: Tensor, variance: Tensor) -> Tensor:
    """Shift to zero mean and scale to unit variance, with given statistics.

    Args:
        values: any shape.
        mask: same shape; the result is 0 where it is False (or 0).
        mean: scalar of the global batch, from `mean_and_variance`.
        variance: scalar of the global batch, from `mean_and_variance`.
    """
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask > 0, white, 0.0).to(values.dtype)
