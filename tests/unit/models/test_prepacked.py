"""Weights packed once, against the plain product."""

import pytest
import torch

from marlhf_mega.models.prepacked import matrix_product

ROWS = 40


@pytest.mark.parametrize("shape", [(1, 24), (32, 24), (5, 3, 24), (0, 24)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_product_is_the_plain_one(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight, bias = (
        torch.randn(ROWS, 24, generator=generator),
        torch.randn(ROWS, generator=generator),
    )
    x = torch.randn(shape, generator=generator)
    found = matrix_product(weight)(x, bias if with_bias else None)
    expected = x.double() @ weight.double().T + (bias if with_bias else 0.0)
    torch.testing.assert_close(found, expected.float())


def test_packed_bfloat16_product_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 24, generator=generator).bfloat16() for rows in (ROWS, 9))
    expected = (x.double() @ weight.double().T).bfloat16()
    # One unit in the last place, where float32 sums fall on the other side of a tie.
    torch.testing.assert_close(matrix_product(weight)(x, None), expected, rtol=2**-7, atol=1e-3)
