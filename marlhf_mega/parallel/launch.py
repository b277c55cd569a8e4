"""All ranks that were launched together, whether they form one world or two."""

import pickle
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


def of_first_rank(value: T) -> T:
    """Return the first rank's picklable value on every rank, before they form a world.

    For ranks of torchrun, whose agent holds the store through which they will meet.
    """
    store, rank, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("of_first_rank", pickle.dumps(value))
    found: T = pickle.loads(store.get("of_first_rank"))
    return found


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The ranks of all worlds of a launch, numbered together. All of them call every method."""

    group: Any
    """What communicates: a process group, or a backend of its own that joins two worlds."""
    rank: int
    """This rank's number in the launch."""
    size: int
    """Ranks of all worlds."""
    device: torch.device

    def exchange(
        self, into: Tensor, out: Tensor, *, into_sizes: list[int], out_sizes: list[int]
    ) -> dist.Work:
        """Start an all-to-all: a part of `out` goes to every rank, a part of `into` comes from it.

        Args:
            into: [sum(into_sizes)], the buffer to receive into.
            out: [sum(out_sizes)], the values to send.
            into_sizes: number of elements from every rank.
            out_sizes: number of elements for every rank.

        Returns:
            The work to wait for before `into` is read or `out` is changed.
        """
        work: dist.Work = self.group.alltoall_base(
            into, out, into_sizes, out_sizes, dist.AllToAllOptions()
        )
        return work

    def broadcast(self, value: T | None, *, source: int) -> T:
        """Return one rank's picklable value on every rank.

        Args:
            value: the value at the source; ignored elsewhere.
            source: that rank's number in the launch.
        """
        if self.size == 1:
            assert value is not None
            return value
        payload = self._bytes(value) if self.rank == source else None
        size = torch.tensor([0 if payload is None else len(payload)], device=self.device)
        self._send(size, source)
        if payload is None:
            payload = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        self._send(payload, source)
        received: T = pickle.loads(payload.cpu().numpy().tobytes())
        return received

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        return [
            self.broadcast(value if rank == self.rank else None, source=rank)
            for rank in range(self.size)
        ]

    def _bytes(self, value: object) -> Tensor:
        payload = bytearray(pickle.dumps(value))
        return torch.frombuffer(payload, dtype=torch.uint8).to(self.device)

    def _send(self, tensor: Tensor, source: int) -> None:
        self.group.broadcast(tensor, source).wait()
