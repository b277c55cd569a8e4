"""Ranges of a tensor's elements are split into few boxes, in order."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.checkpoint.optimizer_pieces import boxes


@st.composite
def runs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    count = math.prod(shape)
    lo = draw(st.integers(0, count - 1))
    return shape, lo, draw(st.integers(lo + 1, count))


@given(runs())
def test_the_boxes_of_a_range_are_its_elements_in_order(run):
    shape, lo, hi = run
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = []
    cut = list(boxes(shape, lo, hi))
    for offsets, sizes in cut:
        index = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        found += numbers[index].flatten().tolist()
    assert found == list(range(lo, hi))
    assert len(cut) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_start_of_a_row():
    assert list(boxes((4, 10), 7, 32)) == [
        ((0, 7), (1, 3)),
        ((1, 0), (2, 10)),
        ((3, 0), (1, 2)),
    ]
