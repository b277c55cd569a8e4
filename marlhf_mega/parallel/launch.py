"""All ranks that were launched together, whether they are one world or two."""

import pickle
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The ranks of all worlds of a launch, numbered anew. All of them call every method."""

    group: Any
    """What carries the messages: a process group, or a backend of its own that joins worlds."""
    rank: int
    """This rank's number in the launch."""
    size: int
    """Ranks of all worlds."""
    device: torch.device

    def exchange(
        self, into: Tensor, out: Tensor, *, into_sizes: list[int], out_sizes: list[int]
    ) -> dist.Work:
        """Start sending a part of `out` to every rank and receiving one of `into` from each.

        Args:
            into: [sum of into_sizes].
            out: [sum of out_sizes].
            into_sizes: elements from every rank.
            out_sizes: elements for every rank.
        """
        work: dist.Work = self.group.alltoall_base(
            into, out, into_sizes, out_sizes, dist.AllToAllOptions()
        )
        return work

    def broadcast(self, value: T | None, *, source: int) -> T:
        """Give every rank the picklable value of one.

        Args:
            value: read at the source only.
            source: its number in the launch.
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
        """Return the values of all ranks, in their order."""
        return [
            self.broadcast(value if rank == self.rank else None, source=rank)
            for rank in range(self.size)
        ]

    def _bytes(self, value: object) -> Tensor:
        payload = bytearray(pickle.dumps(value))
        return torch.frombuffer(payload, dtype=torch.uint8).to(self.device)

    def _send(self, tensor: Tensor, source: int) -> None:
        self.group.broadcast(tensor, source).wait()
