"""Where bytes wait that have to leave a device's memory for a while."""

import ctypes
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from marlhf_mega.platform.device import Platform


class HostBuffer(Protocol):
    """Room for a number of bytes outside of the device's memory."""

    def write(self, start: int, source: Tensor) -> None:
        """Keep a uint8 vector of the device."""

    def read(self, start: int, target: Tensor) -> None:
        """Fill a uint8 vector of the device with what was kept."""


def host_buffer(num_bytes: int, platform: Platform, folder: Path) -> HostBuffer:
    """Make room beside the device: page-locked memory for a GPU, a file for the CPU.

    Args:
        num_bytes: how much.
        platform: of this process.
        folder: where the CPU's file goes, which has no name and ends with the process.
    """
    return _PinnedBuffer(num_bytes) if platform.name == "cuda" else _FileBuffer(folder)


class _PinnedBuffer:
    """Page-locked host memory; copies are queued on the current stream."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        # Torch's own allocator of such memory rounds sizes up to powers of two.
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))

    def __del__(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())

    def write(self, start: int, source: Tensor) -> None:
        self._bytes[start : start + len(source)].copy_(source, non_blocking=True)

    def read(self, start: int, target: Tensor) -> None:
        target.copy_(self._bytes[start : start + len(target)], non_blocking=True)


class _FileBuffer:
    """A file: memory of another kind that a process without a GPU has."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # It lives as long as this object, so no `with` block.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write(self, start: int, source: Tensor) -> None:
        self._file.seek(start)
        self._file.write(_memory(source))
        self._file.flush()

    def read(self, start: int, target: Tensor) -> None:
        self._file.seek(start)
        got = self._file.readinto(_memory(target))
        assert got == len(target), (got, len(target))


def _memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    # A tensor that was shown to numpy could not give its memory back any more.
    return (ctypes.c_char * len(tensor)).from_address(tensor.data_ptr())
