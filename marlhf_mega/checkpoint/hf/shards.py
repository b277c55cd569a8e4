"""Safetensors files of planned sizes, written block by block at planned offsets."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.checkpoint.hf.reader import INDEX_FILE, SINGLE_FILE

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Slot:
    """Where one tensor is stored."""

    file: str
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardPlan:
    """Which tensor goes where in which file; the same on every rank."""

    dtype: torch.dtype
    slots: dict[str, Slot]
    headers: dict[str, bytes]
    """The header of each file."""
    sizes: dict[str, int]
    """Bytes of each file, its header included."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


def plan_shards(
    tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> ShardPlan:
    """Distribute tensors over files in order.

    Args:
        tensors: names and shapes.
        dtype: of every tensor in the files.
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    plan = ShardPlan(dtype, {}, {}, {})
    for number, group in enumerate(groups, start=1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _plan_file(plan, SINGLE_FILE if len(groups) == 1 else several, group)
    return plan


def create_files(plan: ShardPlan, folder: Path) -> None:
    """Create every file with its header and final size, so that all ranks can fill in tensors."""
    for file, header in plan.headers.items():
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(plan.sizes[file])


def write_index(plan: ShardPlan, folder: Path) -> None:
    """Write the index of which file holds which tensor, unless there is only one file."""
    if len(plan.headers) == 1:
        return
    headers = sum(len(header) for header in plan.headers.values())
    index = {
        "metadata": {"total_size": plan.num_bytes - headers},
        "weight_map": {name: slot.file for name, slot in plan.slots.items()},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class BlockWriter:
    """Writes blocks into the files of a plan. Leaving the context flushes them to the disk."""

    def __init__(self, plan: ShardPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        try:
            if error_type is None:
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def write(self, name: str, first_row: int, values: Tensor) -> int:
        """Write whole rows of a tensor with one call to the system; return their bytes.

        Args:
            name: of the tensor.
            first_row: where in it they begin.
            values: [rows, *rest] of the plan's dtype, in host memory.
        """
        slot = self._plan.slots[name]
        assert values.shape[1:] == slot.shape[1:], (name, values.shape)
        row_bytes = prod(slot.shape[1:]) * self._plan.dtype.itemsize
        content: Any = values.contiguous().view(torch.uint8).numpy()
        data = memoryview(content.ravel())
        _write_all(self._descriptor(slot.file), data, slot.offset + first_row * row_bytes)
        return len(data)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._folder / file, os.O_WRONLY)
        return self._descriptors[file]


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _plan_file(plan: ShardPlan, file: str, group: Mapping[str, tuple[int, ...]]) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in group.items():
        starts[name] = end
        end += prod(shape) * plan.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[plan.dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    plan.headers[file] = header
    plan.sizes[file] = len(header) + end
    for name, shape in group.items():
        plan.slots[name] = Slot(file, len(header) + starts[name], shape)
