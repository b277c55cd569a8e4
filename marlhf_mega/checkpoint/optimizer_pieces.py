"""Describe a rank's shard of the optimizer state without gathering it from the other replicas.

Megatron's distributed optimizer gives every data-parallel rank a range of consecutive elements of a
parameter. Sharded checkpoints support boxes only, so a range is split into a few boxes. Each is a
piece of the same tensor that Megatron itself would write, at any layout.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from marlhf_mega.checkpoint.metadata import OPTIMIZER

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one per dim each."""

_STATES = ("param", "exp_avg", "exp_avg_sq")


def owned_pieces(part: DistributedOptimizer, models: Mapping[str, Any]) -> list[ShardedTensor]:
    """Describe the master weights and moments that this rank holds.

    Args:
        part: one of the rank's optimizers.
        models: Megatron's description of the parameters.
    """
    described = {piece.data: piece for piece in nested_values(models)}
    found: list[ShardedTensor] = []
    for dtypes in part.gbuf_ranges:
        for bucket in (bucket for buckets in dtypes.values() for bucket in buckets):
            for parameter, ranges in bucket["param_map"].items():
                state = part._get_main_param_and_optimizer_states(parameter)
                for name in _STATES:
                    key = f"{OPTIMIZER}{name}.{described[parameter].key}"
                    for whole in _unfused(described[parameter], key, state[name].dtype):
                        found += _pieces_of(whole, state[name], ranges["param"].start)
    return found


def _unfused(
    piece: ShardedTensor | ShardedTensorFactory, key: str, dtype: torch.dtype
) -> list[ShardedTensor]:
    """Return the pieces that a parameter is saved as; their data are meta views of it."""
    blank = torch.empty(piece.data.shape, dtype=dtype, device="meta")
    if isinstance(piece, ShardedTensorFactory):
        return list(nested_values(replace(piece, key=key, data=blank).build()))
    return [replace(piece, key=key, data=blank, dtype=dtype)]


def _pieces_of(whole: ShardedTensor, values: Tensor, start: int) -> Iterator[ShardedTensor]:
    """Yield the boxes of a piece that are in a range of the parameter, which begins at `start`."""
    assert whole.data.is_contiguous(), whole
    begin, shape = whole.data.storage_offset(), tuple(whole.data.shape)
    lo, hi = max(start, begin), min(start + len(values), begin + whole.data.numel())
    more = whole.prepend_axis_num
    for offsets, sizes in boxes(shape, lo - begin, hi - begin) if lo < hi else ():
        count = math.prod(sizes)
        local_shape = (1,) * more + sizes
        yield ShardedTensor(
            key=whole.key,
            data=values[lo - start : lo - start + count].view(local_shape),
            dtype=whole.dtype,
            local_shape=local_shape,
            global_shape=whole.global_shape,
            global_offset=tuple(
                a + b for a, b in zip(whole.global_offset, (0,) * more + offsets, strict=True)
            ),
            axis_fragmentations=None,
            # The last number identifies the replica, and only one of them holds the state.
            replica_id=(*whole.replica_id[:-1], 0),
            allow_shape_mismatch=whole.allow_shape_mismatch,
        )
        lo += count


def boxes(shape: tuple[int, ...], lo: int, hi: int) -> Iterator[Box]:
    """Split the elements `lo` to `hi` of a tensor, in row-major order, into boxes, in order."""
    if len(shape) < 2:
        yield ((lo,), (hi - lo,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    while lo < hi:
        row = lo // inner
        num_rows = (hi - lo) // inner if lo % inner == 0 else 0
        if num_rows:
            yield (row,) + (0,) * (len(shape) - 1), (num_rows, *shape[1:])
            lo += num_rows * inner
            continue
        end = min(hi, (row + 1) * inner)
        for offsets, sizes in boxes(shape[1:], lo - row * inner, end - row * inner):
            yield (row, *offsets), (1, *sizes)
        lo = end
