"""Masked sums, means, moments and whitening.

Statistics take two steps, so that a caller can reduce over data-parallel ranks in between:
`masked_moments` gives sums, `mean_and_variance` turns the reduced sums into mean and variance.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum the entries where `mask` is True; entries elsewhere may be anything, NaN included."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the entries where `mask` is True, 0 where nothing is."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums that add up over data-parallel ranks.

    Args:
        values: any shape.
        weights: same shape, bool mask or non-negative counts (e.g. tokens per macro action);
            entries of weight 0 may hold anything.

    Returns:
        [3] float64: sum of weights * values, sum of weights * values^2, sum of weights.
    """
    wide = torch.where(weights > 0, values, 0.0).double()
    weights = weights.double()
    weighted = weights * wide
    return torch.stack((weighted.sum(), (weighted * wide).sum(), weights.sum()))


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance from (reduced) `masked_moments`.

    Args:
        moments: [3] float64 from `masked_moments`, possibly summed over ranks.

    Returns:
        mean and variance, float64 scalars; both 0 without any entry, variance 0 with a single one.
    """
    total, square_total, count = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = (square_total - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    return mean, variance


def whiten(
    values: Tensor, mask: Tensor, *, mean: Tensor, variance: Tensor, shift_mean: bool = True
) -> Tensor:
    """Scale to unit variance and, with `shift_mean`, to zero mean, by statistics passed in.

    Args:
        values: any shape.
        mask: same shape; entries where it is False (or 0) come back as 0.
        mean: scalar of the global batch, from `mean_and_variance`.
        variance: likewise.
        shift_mean: False adds the mean back (used for rewards, whose zero has a meaning).
    """
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask > 0, white, 0.0).to(values.dtype)
