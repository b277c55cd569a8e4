"""Read pieces of a sharded checkpoint into existing tensors, a few megabytes at a time.

Torch's own reader loads every saved tensor that a piece overlaps as a whole, and again for every
piece. A rank that needs a few rows of a large matrix would hold and read far more than it owns.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from marlhf_mega.config.limits import READ_BLOCK_BYTES


@dataclass(frozen=True)
class _Region:
    """A box of a saved tensor, and where it goes."""

    offsets: Sequence[int]
    target: Tensor
    """A view of a piece, of the box's shape."""


@torch.no_grad()
def read_into(folder: Path, pieces: Iterable[ShardedTensor]) -> None:
    """Fill the pieces' tensors, on any device and in any number format. Does not communicate.

    What a checkpoint does not cover, such as the padding of a larger vocabulary, keeps its values.

    Args:
        folder: a folder whose table `read_tensors` has checked.
        pieces: pieces of tensors in that table.

    Raises:
        OSError: a file cannot be read.
        RuntimeError: a file does not match the table.
    """
    reader = FileSystemReader(folder)
    table = reader.read_metadata()
    regions = _overlaps(table, pieces)
    by_file: dict[str, list[MetadataIndex]] = {}
    for index in regions:
        by_file.setdefault(table.storage_data[index].relative_path, []).append(index)
    for name, indices in by_file.items():
        with (folder / name).open("rb") as file:
            for index in sorted(indices, key=lambda index: table.storage_data[index].offset):
                place = table.storage_data[index]
                archive = reader._slice_file(file, place)
                _read_tensor(file, place.offset, archive, regions[index])


def _overlaps(
    table: Metadata, pieces: Iterable[ShardedTensor]
) -> dict[MetadataIndex, list[_Region]]:
    """Return the boxes of saved tensors that make up the pieces."""
    by_key: dict[str, list[ShardedTensor]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    found: dict[MetadataIndex, list[_Region]] = {}
    for key, wanted in by_key.items():
        saved = table.state_dict_metadata[key]
        assert isinstance(saved, TensorStorageMetadata), key
        targets = [piece.data[(None,) * piece.prepend_axis_num] for piece in wanted]
        chunks = [
            ChunkStorageMetadata(torch.Size(piece.global_offset), target.shape)
            for piece, target in zip(wanted, targets, strict=True)
        ]
        for item in create_read_items_for_chunk_list(key, saved, chunks):
            assert item.dest_index.index is not None
            target = targets[item.dest_index.index]
            box = tuple(
                slice(offset, offset + length)
                for offset, length in zip(item.dest_offsets, item.lengths, strict=True)
            )
            found.setdefault(item.storage_index, []).append(
                _Region(item.storage_offsets, target[box])
            )
    return found


def _read_tensor(
    file: BinaryIO, start: int, archive: IO[bytes], regions: Sequence[_Region]
) -> None:
    """Copy boxes of the tensor that `torch.save` wrote at a position of a file."""
    # Reads the tensor's format and where in the archive its values begin, but not the values.
    saved = torch.load(archive, map_location="meta", weights_only=True)
    if not isinstance(saved, Tensor) or not saved.is_contiguous():
        raise RuntimeError(f"{file.name}: does not hold a plain tensor at byte {start}")
    skipped = saved.untyped_storage()._checkpoint_offset
    assert skipped is not None, "torch records where the values of a meta tensor are"
    values = start + skipped + int(saved.storage_offset()) * saved.element_size()
    for region in regions:
        _copy(file, values, saved.shape, region.offsets, region.target, saved.dtype)


def _copy(
    file: BinaryIO,
    start: int,
    shape: Sequence[int],
    offsets: Sequence[int],
    target: Tensor,
    dtype: torch.dtype,
) -> None:
    """Copy the box at `offsets` of a row-major array that begins at byte `start`."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    start += offsets[0] * row_bytes if shape else 0
    if len(shape) > 1 and len(target) == 1:
        _copy(file, start, shape[1:], offsets[1:], target[0], dtype)
        return
    rows = target if shape else target[None]
    inside = tuple(
        slice(offset, offset + size)
        for offset, size in zip(offsets[1:], target.shape[1:], strict=True)
    )
    for lo in range(0, len(rows), step := max(1, READ_BLOCK_BYTES // row_bytes)):
        part = rows[lo : lo + step]
        values = _read(file, start + lo * row_bytes, len(part) * row_bytes).view(dtype)
        part.copy_(values.view(len(part), *shape[1:])[(slice(None), *inside)])


def _read(file: BinaryIO, start: int, count: int) -> Tensor:
    """Return bytes of a file as a uint8 tensor."""
    buffer = torch.empty(count, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(buffer.numpy()) != count:  # type: ignore[attr-defined]
        raise RuntimeError(f"{file.name}: ends before byte {start + count}")
    return buffer
