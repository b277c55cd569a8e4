"""A model's weights as whole Hugging Face tensors, from any layout, to ranks that load them."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.reshard import ModelShard, described
from marlhf_mega.config.limits import MOVE_BUCKET_BYTES, WHOLE_TENSOR_BYTES
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.models.lora import merged_adapters
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.reshard_plan import Block
from marlhf_mega.parallel.resharder import Resharder


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How the ranks hold a tensor."""

    dim: int
    """Dim along which it is sharded."""
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Tensors that travel together."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Name, shape and format of each, in the order in which they are yielded."""
    resharder: Resharder


class WholeTensors:
    """Moves weights from the ranks that train to engines, which load tensors one by one.

    Tensors travel in buckets, so that no rank holds more than its shard, one bucket and what its
    engine keeps. All ranks of the launch must make, and exhaust, it together.
    """

    def __init__(
        self,
        source: ModelShard | None,
        model: ModelConfig,
        mesh: Mesh,
        *,
        receives: bool,
        bucket_bytes: int = WHOLE_TENSOR_BYTES,
    ) -> None:
        """Gather what all ranks hold, and plan the moves.

        Args:
            source: this rank's chunks of the weights and their mesh; None if it trains nothing.
            model: the architecture.
            mesh: a mesh of this rank.
            receives: whether this rank wants the tensors.
            bucket_bytes: most bytes of a bucket; a larger tensor has one of its own.
        """
        blocks, parameters = described(*source) if source else ([], [])
        self._chunks = source[0] if source else []
        self._receives, self._device = receives, mesh.device
        # Of a pipeline each rank knows a few tensors only.
        own = {b.tensor: _Kind(dim=b.dim, dtype=parameters[b.parameter].dtype) for b in blocks}
        kinds = {name: kind for part in mesh.launch.gather(own) for name, kind in part.items()}
        shapes = WeightTable(model, "causal_lm").tensors
        self._buckets = []
        for names in _fill(shapes, kinds, bucket_bytes):
            wanted = [
                Block(
                    tensor=name,
                    dim=kinds[name].dim,
                    lo=0,
                    hi=shapes[name][kinds[name].dim],
                    parameter=number,
                    start=0,
                    index_bytes=prod(shapes[name])
                    // shapes[name][kinds[name].dim]
                    * kinds[name].dtype.itemsize,
                )
                for number, name in enumerate(names)
            ]
            held = [block for block in blocks if block.tensor in set(names)]
            resharder = Resharder(
                (held, parameters),
                (wanted if receives else [], []),
                mesh.launch,
                mesh.platform,
                bucket_bytes=MOVE_BUCKET_BYTES,
            )
            tensors = {name: (shapes[name], kinds[name].dtype) for name in names}
            self._buckets.append(_Bucket(tensors=tensors, resharder=resharder))
        self.total_bytes = sum(bucket.resharder.total_bytes for bucket in self._buckets)
        """Bytes that all ranks together send for one set of weights."""
        self.seconds = 0.0
        """Duration of the last set on this rank, loading included."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values of every tensor as the weights are now.

        Whoever takes a tensor may keep it. A rank that receives nothing gets nothing.
        """
        start = time.perf_counter()
        with self._without_adapters():
            for bucket in self._buckets:
                move = bucket.resharder
                move.targets = [
                    torch.empty(shape, dtype=dtype, device=self._device)
                    for shape, dtype in bucket.tensors.values()
                    if self._receives
                ]
                move.move()
                values = move.targets[::-1]
                move.targets = []
                for name in bucket.tensors if self._receives else ():
                    yield name, values.pop()
        self.seconds = time.perf_counter() - start

    def move(self) -> None:
        """Send the weights as they are now; for ranks that receive nothing."""
        assert not self._receives
        for _ in self:
            pass

    def _without_adapters(self) -> AbstractContextManager[None]:
        """Hold the weights with their adapters merged, if there are any."""
        if not self._chunks or not self._chunks[0].has_adapters:
            return nullcontext()
        return merged_adapters(self._chunks)


def _fill(
    shapes: dict[str, tuple[int, ...]], kinds: dict[str, _Kind], bucket_bytes: int
) -> Iterator[list[str]]:
    """Split tensors into buckets, in their order: an engine then completes layer after layer."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * kinds[name].dtype.itemsize
        if names and filled + size > bucket_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names
