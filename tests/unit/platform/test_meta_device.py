"""Allocations without memory, in Megatron's code as in ours, and everything back afterwards."""

import pytest
import torch

from marlhf_mega.platform import prepare
from marlhf_mega.platform.cpu import shim
from marlhf_mega.platform.meta_device import on_meta


def leave_by_an_error():
    with on_meta() as meta:
        assert torch.zeros(10**12).device == meta
        assert shim.cuda_of_megatron().current_device() == meta
        raise KeyError


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU's stand-in for CUDA")
def test_the_block_ends_with_the_devices_of_before():
    prepare()
    before = shim.cuda_of_megatron().current_device(), torch.Tensor.type
    with pytest.raises(KeyError):
        leave_by_an_error()
    assert (shim.cuda_of_megatron().current_device(), torch.Tensor.type) == before
    assert torch.zeros(1).device.type == "cpu"
