"""Move weights between two layouts, a bucket at a time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.config.limits import MOVE_BUCKET_BYTES
from marlhf_mega.parallel.launch import Launch
from marlhf_mega.parallel.transfer_plan import (
    Block,
    Transfer,
    padded_bytes,
    plan_transfers,
    schedule_rounds,
)
from marlhf_mega.platform import Platform


@dataclass(frozen=True)
class _Round:
    """One exchange as this rank sees it."""

    out: list[Transfer]
    """In the order of the targets."""
    into: list[Transfer]
    """In the order of the sources."""
    out_sizes: list[int]
    """Bytes for every rank."""
    into_sizes: list[int]
    """Bytes from every rank."""


class Mover:
    """Fills parameters of one layout from those of another; all ranks of both call its methods."""

    def __init__(
        self,
        sources: tuple[Sequence[Block], Sequence[Tensor]],
        targets: tuple[Sequence[Block], Sequence[Tensor]],
        launch: Launch,
        platform: Platform,
        *,
        bucket_bytes: int = MOVE_BUCKET_BYTES,
    ) -> None:
        """Plan the move; every rank gets to know what all ranks hold and need.

        Args:
            sources: this rank's blocks, and the parameters that their numbers mean.
            targets: what it is to hold, likewise.
            launch: the ranks of both layouts; one may have a part in one of them only.
            platform: of this rank.
            bucket_bytes: memory for all buckets of a rank together.

        Raises:
            RuntimeError: the layouts are not of the same model.
        """
        self.launch, self.platform = launch, platform
        self.sources, self.targets = list(sources[1]), list(targets[1])
        both = launch.gather((sources[0], targets[0]))
        plan = plan_transfers([b[0] for b in both], [b[1] for b in both])
        rounds = schedule_rounds(plan, limit_bytes=bucket_bytes // 4)
        self.total_bytes = sum(t.num_bytes for t in plan if not t.is_local)
        """What all ranks together send to others in one move."""
        self.seconds = 0.0
        """How long the last move took on this rank."""
        self._local = [t for t in plan if t.is_local and t.source == launch.rank]
        self._rounds = [self._own(transfers) for transfers in rounds]

    @torch.no_grad()
    def move(self) -> None:
        """Copy the source's values into the target; returns when this rank's are in place."""
        self.platform.synchronize()
        start = time.perf_counter()
        self._allocate()
        buckets = [self._buckets(number) for number in range(min(2, len(self._rounds)))]
        works: list[dist.Work] = []
        for number, this in enumerate(self._rounds):
            out, into = buckets[number % 2]
            if number >= 2:
                self._unpack(number - 2, works, into)
            self._pack(this, out)
            works.append(
                self.launch.exchange(
                    into[: sum(this.into_sizes)],
                    out[: sum(this.out_sizes)],
                    into_sizes=this.into_sizes,
                    out_sizes=this.out_sizes,
                )
            )
        for transfer in self._local:
            self._target_part(transfer).copy_(self._source_part(transfer))
        for number in range(max(0, len(works) - 2), len(works)):
            self._unpack(number, works, buckets[number % 2][1])
        self.platform.synchronize()
        self.seconds = time.perf_counter() - start

    def release(self) -> None:
        """Give the target's memory back; its values are lost until the next move."""
        for tensor in self.targets:
            tensor.untyped_storage().resize_(0)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Hold the target's weights for the length of a `with` block only."""
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
                # The vocabulary's padding is not sent.
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
        """Allocate room for the largest of every other round."""
        mine = self._rounds[parity::2]

        def room(sizes: Sequence[list[int]]) -> Tensor:
            most = max(map(sum, sizes))
            return torch.empty(most, dtype=torch.uint8, device=self.launch.device)

        return room([r.out_sizes for r in mine]), room([r.into_sizes for r in mine])

    def _pack(self, this: _Round, bucket: Tensor) -> None:
        done = 0
        for transfer in this.out:
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
    """Return the transfer's place in a bucket, in the dtype and shape of its tensor."""
    return bucket[start : start + transfer.num_bytes].view(like.dtype).view(like.shape)
