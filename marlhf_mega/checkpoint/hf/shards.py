"""Safetensors files of known sizes, written piece by piece at known places."""

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
from marlhf_mega.checkpoint.hf.table import Piece

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WRITE_BYTES = 64 * 2**20
"""Bytes converted and written at a time."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor lives."""

    file: str
    offset: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardPlan:
    """Which file holds which tensor; the same on every rank."""

    dtype: torch.dtype
    slots: dict[str, Slot]
    headers: dict[str, bytes]
    """What each file begins with."""
    sizes: dict[str, int]
    """Bytes of each file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Fragment:
    """One piece and its values, which may be a view of a parameter on any device."""

    piece: Piece
    values: Tensor


def plan_shards(
    tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> ShardPlan:
    """Distribute tensors over files in order.

    Args:
        tensors: names and shapes.
        dtype: of every tensor in the files.
        max_shard_bytes: a file is not continued beyond this; one larger tensor has its own file.
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
    """Write every header and give every file its size, so that all ranks can fill them."""
    for file, header in plan.headers.items():
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(plan.sizes[file])


def write_index(plan: ShardPlan, folder: Path) -> None:
    """Write which file holds which tensor, where there is more than one file."""
    if len(plan.headers) == 1:
        return
    headers = sum(len(header) for header in plan.headers.values())
    index = {
        "metadata": {"total_size": plan.num_bytes - headers},
        "weight_map": {name: slot.file for name, slot in plan.slots.items()},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class PieceWriter:
    """Writes fragments into the files of a plan. Leaving the context syncs to disk."""

    def __init__(self, plan: ShardPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        try:
            if error_type is None:
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def write(self, fragment: Fragment) -> int:
        """Convert and write one fragment; returns its bytes."""
        assert fragment.piece.name is not None
        slot = self._plan.slots[fragment.piece.name]
        descriptor = self._descriptor(slot.file)
        first, *rest = slot.shape
        row_bytes = prod(rest) * self._plan.dtype.itemsize
        lo, hi, skip = fragment.piece.lo, fragment.piece.hi, 0
        if fragment.piece.dim == 1:
            skip = lo * row_bytes // rest[0]
            lo, hi = 0, first
        step = max(1, _WRITE_BYTES // row_bytes)
        for top in range(lo, hi, step):
            rows = fragment.values[top - lo : min(top + step, hi) - lo]
            data = _bytes_of(rows.detach().to("cpu", self._plan.dtype))
            offset = slot.offset + top * row_bytes + skip
            if data.size == rows.shape[0] * row_bytes:
                _write_all(descriptor, memoryview(data.ravel()), offset)
                continue
            for number, row in enumerate(data):
                _write_all(descriptor, memoryview(row), offset + number * row_bytes)
        return fragment.values.numel() * self._plan.dtype.itemsize

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._folder / file, os.O_WRONLY)
        return self._descriptors[file]


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


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
