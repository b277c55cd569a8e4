"""The few collectives that the layers above need. Every rank of the group calls each of them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.parallel.mesh import Group, Mesh

T = TypeVar("T")


def sum_over_data(value: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the data-parallel ranks; returns a new tensor."""
    result = value.clone()
    dist.all_reduce(result, group=mesh.groups.dp)
    return result


def max_over_world(value: Tensor) -> Tensor:
    """Element-wise maximum over all ranks; returns a new tensor."""
    result = value.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


def max_over_replicas(value: int, mesh: Mesh) -> int:
    """Return the largest value among the ranks that share a model's experts or its stages."""
    number = torch.tensor(value, device=mesh.device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=mesh.groups.tp_ep_pp)
    return int(number.item())


def any_over_group(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether the flag is set on any rank of a group."""
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def any_over_world(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    return bool(max_over_world(torch.tensor(int(flag), device=device)).item())


def broadcast_from_last_stage(value: Tensor | None, shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    """Give every pipeline stage what the last one holds.

    Args:
        value: float32 [*shape] on the last stage; ignored elsewhere.
        shape: the shape, known to all stages.
        mesh: the mesh.

    Returns:
        float32 [*shape] on every stage.
    """
    if mesh.pp_size == 1:
        assert value is not None
        return value
    if mesh.is_last_stage:
        assert value is not None
        assert value.shape == shape, (value.shape, shape)
        buffer = value.float().contiguous()
    else:
        buffer = torch.empty(shape, device=mesh.device)
    dist.broadcast(buffer, group_src=mesh.pp_size - 1, group=mesh.groups.pp)
    return buffer


def gather_objects_over_data(value: T, mesh: Mesh) -> list[T]:
    """Collect one small Python value (texts, counts) per data-parallel rank, in rank order."""
    parts: list[T] = [value] * mesh.dp_size
    if mesh.dp_size > 1:
        dist.all_gather_object(parts, value, group=mesh.groups.dp)
    return parts


def share_in_replica(value: T | None, mesh: Mesh) -> T:
    """Give every rank of a replica the small Python value that its first rank holds."""
    box = [value]
    # The first rank's peers along the context, then everyone's along tensor and pipeline.
    for group in (mesh.groups.cp, mesh.groups.mp):
        if group.size() > 1:
            dist.broadcast_object_list(box, group_src=0, group=group)
    received = box[0]
    assert received is not None
    return received


def sum_over_world(value: Tensor) -> Tensor:
    """Sum over all ranks; returns a new tensor."""
    result = value.clone()
    dist.all_reduce(result)
    return result


def broadcast_object(value: T | None) -> T:
    """Give every rank the Python value of rank 0."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    received = box[0]
    assert received is not None
    return received


def broadcast_from_first(value: Tensor, group: Group | None = None) -> Tensor:
    """Overwrite a tensor of every rank with that of the group's (or world's) first, in place."""
    dist.broadcast(value, group_src=0, group=group)
    return value


def gather_over_world(row: Tensor, mesh: Mesh) -> Tensor:
    """Stack every rank's equally shaped tensor, [*shape] -> [world, *shape] on the CPU."""
    parts = [torch.empty_like(row, device=mesh.device) for _ in range(mesh.world_size)]
    dist.all_gather(parts, row.to(mesh.device))
    return torch.stack(parts).cpu()


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def agree_on_error(error: str | None, mesh: Mesh) -> str | None:
    """Tell every rank the first rank's error, so that all of them stop or none does.

    Args:
        error: this rank's message, none if all is well.
        mesh: the mesh.

    Returns:
        `rank R: message` of the first rank that has one, else none; the same on all ranks.
    """
    if not any_over_world(error is not None, mesh.device):
        return None
    messages: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(messages, error)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None)


def send_hidden(hidden: Tensor, mesh: Mesh, *, to_stage: int) -> dist.Work | None:
    """Start sending activations to a pipeline stage; wait on the result before reuse."""
    return dist.isend(hidden, group_dst=to_stage, group=mesh.groups.pp)


def receive_hidden(buffer: Tensor, mesh: Mesh, *, from_stage: int) -> Tensor:
    """Fill the buffer with activations from a pipeline stage."""
    dist.recv(buffer, group_src=from_stage, group=mesh.groups.pp)
    return buffer


def share_sampled(sampled: Tensor, mesh: Mesh) -> Tensor:
    """Broadcast what the last stage sampled, in place, over a group of its own."""
    if mesh.pp_size > 1:
        dist.broadcast(sampled, group_src=mesh.pp_size - 1, group=mesh.rollout_pp)
    return sampled


def gather_over_tensor(columns: Tensor, group: Group) -> Tensor:
    """Concatenate the tensor-parallel ranks' [batch, n] along the last dim, in rank order."""
    if group.size() == 1:
        return columns
    parts = [torch.empty_like(columns) for _ in range(group.size())]
    dist.all_gather(parts, columns.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def sum_over_tensor(value: Tensor, group: Group) -> Tensor:
    """Sum over the tensor-parallel ranks, in place."""
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


class WorldPeers:
    """All ranks as the parties of one undertaking, such as writing a folder together."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.rank = mesh.rank

    def agree(self, error: str | None) -> str | None:
        """Return the first rank's error, none if all are well; also a barrier."""
        return agree_on_error(error, self._mesh)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value to rank 0, an empty list to the others."""
        parts: list[T] = [value] * self._mesh.world_size
        dist.gather_object(value, parts if self.rank == 0 else None, dst=0)
        return parts if self.rank == 0 else []


def share_from_first(value: T, mesh: Mesh) -> T:
    """Give every rank the small Python value that rank 0 holds."""
    box = [value]
    if mesh.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
