"""What Megatron's groups and collectives become on gloo: fewer, faster, able to run beside passes.

Megatron opens a coalescing manager, starts collectives in it, and waits for the manager where they
are to be asynchronous. Messages of gloo travel in threads of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed.distributed_c10d as c10d

PIECE = 1 << 20
"""Elements of a shard that travel together."""


_groups_of_one: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()
"""By the world that they belong to, and by their rank."""


def new_group(
    ranks: list[int] | None = None, *, backend: str | None = None, **options: Any
) -> torch.distributed.ProcessGroup:
    """Make a group; all that hold one rank alone are the same.

    Megatron makes about twelve of them, and each group of gloo has a thread that wakes up 100 times
    a second beside those that compute.
    """
    if ranks is None or len(ranks) != 1 or backend is not None:
        return torch.distributed.new_group(ranks, backend=backend, **options)
    known = _groups_of_one.setdefault(torch.distributed.group.WORLD, {})
    if ranks[0] not in known:
        known[ranks[0]] = torch.distributed.new_group(ranks, **options)
    return known[ranks[0]]


class _UnderWay:
    """A collective that has been started."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


_started: list[_UnderWay] = []
"""Since the coalescing manager that is open was opened."""


@contextmanager
def coalescing_manager(
    group: torch.distributed.ProcessGroup, *, async_ops: bool = False
) -> Iterator[Any]:
    """Do what torch's does, for the collectives of this module: end them here or at its `wait`."""
    with c10d._coalescing_manager(group, async_ops=async_ops) as manager:
        yield manager
    for collective in _started:
        if async_ops:
            manager.append(collective)
        else:
            collective.wait()
    _started.clear()


def all_gather(
    output: torch.Tensor,
    input: torch.Tensor,
    *,
    group: torch.distributed.ProcessGroup,
    async_op: bool,
) -> None:
    """Collect the ranks' shards of the weights by messages: gloo's own takes three times as long.

    `input` is this rank's slice of `output`, as Megatron's distributed optimizer has it. The
    coalescing manager knows when it is over, whether asynchronous or not.
    """
    shards, rank = output.chunk(group.size()), group.rank()
    assert shards[rank].data_ptr() == input.data_ptr()
    messages = []
    for step in range(1, len(shards)):
        to, source = (rank + step) % len(shards), (rank - step) % len(shards)
        messages.append(torch.distributed.isend(input, group=group, group_dst=to))
        messages.append(torch.distributed.irecv(shards[source], group=group, group_src=source))

    def wait() -> None:
        for message in messages:
            if message is not None:
                message.wait()

    _started.append(_UnderWay(wait))


def reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    *,
    op: object,
    group: torch.distributed.ProcessGroup,
    async_op: bool,
) -> None:
    """Exchange shards of the gradients and add them up here: gloo's own takes four times as long.

    `output` is this rank's slice of `input`, as Megatron's distributed optimizer has it. The
    coalescing manager knows when it is over, whether asynchronous or not.
    """
    assert op == torch.distributed.ReduceOp.SUM
    size = group.size()
    assert output.data_ptr() == input.chunk(size)[group.rank()].data_ptr()
    if size == 1:
        return
    if not async_op:
        _started.append(_UnderWay(partial(_add_up_pieces, input.chunk(size), group)))
        return
    received = torch.empty_like(input)
    exchange = torch.distributed.all_to_all_single(received, input, group=group, async_op=True)

    def wait() -> None:
        exchange.wait()
        torch.sum(received.view(size, -1), 0, out=output)

    _started.append(_UnderWay(wait))


def _add_up_pieces(shards: tuple[torch.Tensor, ...], group: torch.distributed.ProcessGroup) -> None:
    """Add the other ranks' values to this rank's shard, one piece while the next one travels.

    Room for all of them would be mapped anew each time, which takes longer than the addition.
    """
    rank, size = group.rank(), len(shards)
    own = shards[rank].split(PIECE)
    rooms = shards[rank].new_empty(min(2, len(own)), size, len(own[0]))

    def start(index: int) -> list[Any]:
        messages = []
        for step in range(1, size):
            to, source = (rank + step) % size, (rank - step) % size
            room = rooms[index % 2, source, : len(own[index])]
            piece = shards[to].split(PIECE)[index]
            messages.append(torch.distributed.isend(piece, group=group, group_dst=to))
            messages.append(torch.distributed.irecv(room, group=group, group_src=source))
        return messages

    under_way = start(0)
    for index, piece in enumerate(own):
        for message in under_way:
            message.wait()
        under_way = start(index + 1) if index + 1 < len(own) else []
        room = rooms[index % 2, :, : len(piece)]
        room[rank] = piece
        torch.sum(room, 0, out=piece)


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Iterable[int] | None = None,
    input_split_sizes: Iterable[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Take tensors as split sizes too, which MoE gives unless they were on a GPU."""
    return torch.distributed.all_to_all_single(
        output, input, _int_list(output_split_sizes), _int_list(input_split_sizes), **kwargs
    )


def _int_list(sizes: Iterable[int] | None) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]
