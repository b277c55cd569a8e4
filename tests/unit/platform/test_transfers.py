"""Small copies between host and device, here on a CPU and on the meta device."""

import pytest
import torch

from marlhf_mega.platform.transfers import fetch, upload


def test_numbers_go_there_and_back():
    there = upload([[1, 2], [3, 4]], torch.device("cpu"))
    first, second = fetch(there, there[0])
    assert first.dtype == torch.int64
    assert first.tolist() == [[1, 2], [3, 4]]
    assert second.tolist() == [1, 2]


def test_a_tensor_without_values_can_be_made_but_not_fetched():
    there = upload([1, 2], torch.device("meta"))
    assert there.shape == (2,)
    with pytest.raises(NotImplementedError):
        fetch(there)
