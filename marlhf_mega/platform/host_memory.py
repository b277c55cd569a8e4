"""Host memory for tensors that are offloaded from the device, or copied to be written."""

import ctypes
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.platform.device import Platform

_ALIGNMENT = 64


def host_buffer(num_bytes: int, platform: Platform, folder: Path) -> "HostBuffer":
    """Allocate a buffer of uint8: page-locked memory for a GPU, a file for the CPU.

    Args:
        num_bytes: size of the buffer.
        platform: this process's platform.
        folder: where the CPU's file is created; it has no name and disappears with the process.
    """
    return _PinnedBuffer(num_bytes) if platform.name == "cuda" else _FileBuffer(folder)


class _PinnedBuffer:
    """Page-locked host memory; copies run on the current stream."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        # Torch's own allocator for such memory rounds sizes up to powers of two.
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))

    def __del__(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())

    def part(self, start: int, like: Tensor) -> Tensor:
        """Return the memory from a byte on, as a tensor of the same size and format."""
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def write(self, start: int, source: Tensor) -> None:
        self._bytes[start : start + len(source)].copy_(source, non_blocking=True)

    def read(self, start: int, target: Tensor) -> None:
        target.copy_(self._bytes[start : start + len(target)], non_blocking=True)


class _FileBuffer:
    """An unnamed file, the only other memory that a process without a GPU has."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # It must stay open as long as this object, so no `with` block.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write(self, start: int, source: Tensor) -> None:
        self._file.seek(start)
        self._file.write(_memory(source))
        self._file.flush()

    def read(self, start: int, target: Tensor) -> None:
        self._file.seek(start)
        got = self._file.readinto(_memory(target))
        assert got == len(target), (got, len(target))


HostBuffer = _PinnedBuffer | _FileBuffer
"""Takes and gives uint8 vectors on the device, from an offset on."""


def _memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    # A view by numpy would keep the tensor's storage from being resized.
    return (ctypes.c_char * len(tensor)).from_address(tensor.data_ptr())


class HostCopies:
    """Copies tensors to the host, from a GPU into page-locked memory that the next copies reuse.

    Fresh memory would be mapped page by page, and copied to at a fraction of the bus's speed.
    """

    def __init__(self, platform: Platform) -> None:
        """Allocate nothing yet."""
        self._platform = platform
        self._buffer: _PinnedBuffer | None = None
        self._size = 0

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors; the copies of the call before are lost."""
        if self._platform.name != "cuda":
            return [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        *starts, total = accumulate(sizes, initial=0)
        if self._buffer is None or total > self._size:
            self._buffer = None  # before the larger one is registered
            self._buffer, self._size = _PinnedBuffer(max(total, 1)), total
        copies = [self._buffer.part(*place) for place in zip(starts, tensors, strict=True)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        self._platform.synchronize_computation()
        return copies
