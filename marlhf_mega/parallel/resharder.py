"""Reshard weights: copy them between two layouts through buckets of bounded size."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.config.limits import MOVE_BUCKET_BYTES
from marlhf_mega.parallel.launch import Launch
from marlhf_mega.parallel.reshard_plan import (
    Block,
    Transfer,
    padded_bytes,
    plan_transfers,
    schedule_rounds,
)
from marlhf_mega.platform import Platform


@dataclass(frozen=True)
class _Round:
    """This rank's part of one all-to-all."""

    out: list[Transfer]
    """Ordered by target rank."""
    into: list[Transfer]
    """Ordered by source rank."""
    out_sizes: list[int]
    """Bytes to every rank."""
    into_sizes: list[int]
    """Bytes from every rank."""


class Resharder:
    """Copies parameters from one layout to another. All ranks of both must call every method."""

    def __init__(
        self,
        sources: tuple[Sequence[Block], Sequence[Tensor]],
        targets: tuple[Sequence[Block], Sequence[Tensor]],
        launch: Launch,
        platform: Platform,
        *,
        bucket_bytes: int = MOVE_BUCKET_BYTES,
    ) -> None:
        """Gather what all ranks hold and need, and plan the transfers.

        Args:
            sources: blocks that this rank holds, and the parameters that they index.
            targets: blocks that this rank needs, and the parameters that they index.
            launch: the ranks of both layouts; a rank may belong to only one of them.
            platform: this rank's platform.
            bucket_bytes: memory for all buckets of a rank together.

        Raises:
            RuntimeError: the layouts do not belong to the same model.
        """
        self.launch, self.platform = launch, platform
        self.sources, self.targets = list(sources[1]), list(targets[1])
        both = launch.gather((sources[0], targets[0]))
        plan = plan_transfers([b[0] for b in both], [b[1] for b in both])
        rounds = schedule_rounds(plan, limit_bytes=bucket_bytes // 4)
        self.total_bytes = sum(t.num_bytes for t in plan if not t.is_local)
        """Bytes that all ranks together send in one move."""
        self.seconds = 0.0
        """Duration of the last move on this rank."""
        self._local = [t for t in plan if t.is_local and t.source == launch.rank]
        self._rounds = [self._own(transfers) for transfers in rounds]

    @torch.no_grad()
    def move(self) -> None:
        """Copy the source values to the targets; returns when this rank's targets are filled."""
        self.platform.synchronize()
        start = time.perf_counter()
        self._allocate()
        buckets = [self._buckets(number) for number in range(min(2, len(self._rounds)))]
        works: list[dist.Work] = []
        for number, current in enumerate(self._rounds):
            out, into = buckets[number % 2]
            if number >= 2:
                self._unpack(number - 2, works, into)
            self._pack(current, out)
            works.append(
                self.launch.exchange(
                    into[: sum(current.into_sizes)],
                    out[: sum(current.out_sizes)],
                    into_sizes=current.into_sizes,
                    out_sizes=current.out_sizes,
                )
            )
        for transfer in self._local:
            self._target_part(transfer).copy_(self._source_part(transfer))
        for number in range(max(0, len(works) - 2), len(works)):
            self._unpack(number, works, buckets[number % 2][1])
        self.platform.synchronize()
        self.seconds = time.perf_counter() - start

    def release(self) -> None:
        """Free the memory of the targets; their values are lost until the next move."""
        for tensor in self.targets:
            tensor.untyped_storage().resize_(0)

    @contextmanager
    def fresh_weights(self) -> Iterator[None]:
        """Fill the targets for the length of a `with` block, and free them afterwards."""
        self.move()
        try:
            yield
        finally:
            self.release()

    def _allocate(self) -> None:
        for tensor in self.targets:
            storage = tensor.untyped_storage()
            if storage.size() == 0:
                storage.resize_(tensor.numel() * tensor.element_size())
                # Padding of the vocabulary is not sent.
                tensor.zero_()

    def _own(self, transfers: Sequence[Transfer]) -> _Round:
        rank, world = self.launch.rank, range(self.launch.size)
        out = sorted((t for t in transfers if t.source == rank), key=lambda t: t.target)
        into = sorted((t for t in transfers if t.target == rank), key=lambda t: t.source)
        return _Round(
            out=out,
            into=into,
            out_sizes=[sum(padded_bytes(t) for t in out if t.target == r) for r in world],
            into_sizes=[sum(padded_bytes(t) for t in into if t.source == r) for r in world],
        )

    def _buckets(self, parity: int) -> tuple[Tensor, Tensor]:
        """Allocate a bucket to send and one to receive, for the even or the odd rounds."""
        rounds = self._rounds[parity::2]

        def bucket(sizes: Sequence[list[int]]) -> Tensor:
            largest = max(map(sum, sizes))
            return torch.empty(largest, dtype=torch.uint8, device=self.launch.device)

        return bucket([r.out_sizes for r in rounds]), bucket([r.into_sizes for r in rounds])

    def _pack(self, current: _Round, bucket: Tensor) -> None:
        done = 0
        for transfer in current.out:
            part = self._source_part(transfer)
            _typed(bucket, done, transfer, part).copy_(part)
            done += padded_bytes(transfer)

    def _unpack(self, number: int, works: Sequence[dist.Work], bucket: Tensor) -> None:
        works[number].wait()
        done = 0
        for transfer in self._rounds[number].into:
            part = self._target_part(transfer)
            part.copy_(_typed(bucket, done, transfer, part))
            done += padded_bytes(transfer)

    def _source_part(self, transfer: Transfer) -> Tensor:
        whole = self.sources[transfer.source_parameter]
        return whole.narrow(transfer.dim, transfer.source_start, transfer.size)

    def _target_part(self, transfer: Transfer) -> Tensor:
        whole = self.targets[transfer.target_parameter]
        return whole.narrow(transfer.dim, transfer.target_start, transfer.size)


def _typed(bucket: Tensor, start: int, transfer: Transfer, like: Tensor) -> Tensor:
    """Return the view of a bucket that holds a transfer, with the dtype and shape of `like`."""
    return bucket[start : start + transfer.num_bytes].view(like.dtype).view(like.shape)
