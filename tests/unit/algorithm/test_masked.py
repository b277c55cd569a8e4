import math

import pytest
import torch

from marlhf_mega.algorithm.masked import (
    masked_moments,
    masked_sum,
    mean_and_variance,
    whiten,
)

VALUES = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sums_ignore_what_the_mask_hides():
    assert masked_sum(VALUES, MASK) == 7.0
    assert masked_sum(VALUES, MASK, 1).tolist() == [3.0, 4.0]


def test_moments_of_parts_add_up_to_the_moments_of_the_whole():
    mean, variance = mean_and_variance(
        masked_moments(VALUES[:1], MASK[:1]) + masked_moments(VALUES[1:], MASK[1:])
    )
    # 1, 2, 4: mean 7/3, squared distances 16/9 + 1/9 + 25/9 over 2
    assert mean.item() == pytest.approx(7 / 3)
    assert variance.item() == pytest.approx(42 / 18)


def test_weights_count_an_entry_several_times():
    moments = masked_moments(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([3, 1, 0]))
    assert moments.tolist() == [8.0, 28.0, 4.0]


@pytest.mark.parametrize(("num", "mean"), [(0, 0.0), (1, 3.0)])
def test_fewer_than_two_entries_have_no_variance(num, mean):
    found = mean_and_variance(masked_moments(torch.full((2,), 3.0), torch.arange(2) < num))
    assert [x.item() for x in found] == [mean, 0.0]


def test_whitening_shifts_scales_and_clears_padding():
    values, mask = torch.tensor([1.0, 2.0, 3.0, math.nan]), torch.tensor([1, 1, 1, 0]).bool()
    mean, variance = mean_and_variance(masked_moments(values, mask))
    white = whiten(values, mask, mean=mean, variance=variance)
    torch.testing.assert_close(white, torch.tensor([-1.0, 0.0, 1.0, 0.0]))
