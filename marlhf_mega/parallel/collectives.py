"""The few collectives that the layers above need. All ranks of the group must call each of them.

A `group` of None means all ranks of the world. Python values must be small and picklable.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega import platform
from marlhf_mega.parallel.mesh import Group, Mesh

T = TypeVar("T")

# The name since torch 2.13, and the one before it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sum_over_world(value: Tensor) -> Tensor:
    """Sum over all ranks; returns a new tensor."""
    return _reduced(value)


def sum_over_data(value: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the data-parallel ranks; returns a new tensor."""
    return _reduced(value, group=mesh.groups.dp)


def reduce_over_tensor(value: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Combine the tensor-parallel ranks' values, in place."""
    if group.size() > 1:
        dist.all_reduce(value, op=op, group=group)
    return value


def max_over_tensor(value: Tensor, group: Group) -> Tensor:
    """Take the tensor-parallel ranks' element-wise maximum, in place."""
    return reduce_over_tensor(value, group, dist.ReduceOp.MAX)


def min_over_tensor(value: Tensor, group: Group) -> Tensor:
    """Take the tensor-parallel ranks' element-wise minimum, in place."""
    return reduce_over_tensor(value, group, dist.ReduceOp.MIN)


def max_over_world(value: Tensor) -> Tensor:
    """Element-wise maximum over all ranks; returns a new tensor."""
    return _reduced(value, dist.ReduceOp.MAX)


def max_over_replicas(value: int, mesh: Mesh) -> int:
    """Return the largest value over the tensor-, expert- and pipeline-parallel ranks."""
    number = torch.tensor(value, device=mesh.device)
    return int(_reduced(number, dist.ReduceOp.MAX, mesh.groups.tp_ep_pp))


def any_rank(flag: bool, device: torch.device, group: Group | None = None) -> bool:
    """Whether the flag is set on any rank, or on any of a group."""
    return bool(_reduced(torch.tensor(int(flag), device=device), dist.ReduceOp.MAX, group))


def gather_stacked(value: Tensor, group: Group | None = None) -> Tensor:
    """Return every rank's [...] as [ranks, ...]; all have one shape and dtype."""
    size = _size(group)
    if size == 1:
        return value[None]
    # Into one tensor: NCCL would copy parts that lie apart one by one.
    whole = value.new_empty(size * value.numel())
    _all_gather(whole, value.contiguous().view(-1), group=group)
    return whole.view(size, *value.shape)


def gather_tensors(value: Tensor, group: Group | None = None) -> list[Tensor]:
    """Return the tensor of every rank of a group, in rank order; all have one shape and dtype."""
    return list(gather_stacked(value, group).unbind())


def gather_columns(value: Tensor, group: Group) -> Tensor:
    """Concatenate the ranks' [..., n] along the last dim, in rank order."""
    parts = gather_tensors(value, group)
    return torch.cat(parts, dim=-1) if len(parts) > 1 else value


def send_bytes(
    value: Tensor, sizes: Sequence[int], group: Group | None, *, to: int
) -> list[Tensor]:
    """Send every rank's bytes to one rank of a group, and return them there, in rank order.

    Args:
        value: [bytes] uint8 on the backend's device.
        sizes: number of bytes from every rank.
        group: the ranks that call it.
        to: the receiving rank, counted within the group; the others get an empty list.
    """
    receives = dist.get_rank(group) == to
    received = value.new_empty(sum(sizes) if receives else 0)
    out_sizes = [len(value) if rank == to else 0 for rank in range(_size(group))]
    into_sizes = list(sizes) if receives else [0] * len(sizes)
    dist.all_to_all_single(received, value, into_sizes, out_sizes, group=group)
    return list(received.split(into_sizes)) if receives else []


def gather_objects(value: T, group: Group | None = None) -> list[T]:
    """Return the Python value of every rank of a group, in rank order."""
    parts = [value] * _size(group)
    if len(parts) > 1:
        dist.all_gather_object(parts, value, group=group)
    return parts


def gather_objects_to_first(value: T) -> list[T]:
    """Return the Python value of every rank, in rank order, on rank 0; an empty list elsewhere."""
    is_first = dist.get_rank() == 0
    parts = [value] * dist.get_world_size() if is_first else []
    dist.gather_object(value, parts if is_first else None, dst=0)
    return parts


def broadcast_from(source: int, value: Tensor, group: Group) -> None:
    """Overwrite a tensor, in place, with that of a rank of the group, counted within the group."""
    if group.size() > 1:
        dist.broadcast(value, group_src=source, group=group)


def broadcast_from_last_stage(value: Tensor | None, shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    """Return the last pipeline stage's tensor on every stage.

    Args:
        value: [*shape] on the last stage; ignored elsewhere.
        shape: its shape, known to all stages.
        mesh: this rank's mesh.

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


def broadcast_object(value: T, group: Group | None = None) -> T:
    """Return the Python value of a group's first rank."""
    box = [value]
    if _size(group) > 1:
        dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def share_in_replica(value: T | None, mesh: Mesh) -> T:
    """Return the Python value of the first rank of this rank's model replica."""
    # First along the context-parallel axis, then from each of those ranks along the other two.
    received = broadcast_object(broadcast_object(value, mesh.groups.cp), mesh.groups.mp)
    assert received is not None
    return received


def share_sampled(sampled: Tensor, mesh: Mesh) -> Tensor:
    """Broadcast what the last stage sampled, in place, over a process group of its own.

    Raises:
        RuntimeError: it did not arrive in time. With NCCL the process is ended instead.
    """
    if mesh.pp_size == 1:
        return sampled
    try:
        dist.broadcast(sampled, group_src=mesh.pp_size - 1, group=mesh.rollout_pp)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"rollout: pipeline stage {mesh.pp_rank} must get the sampled tokens of the last stage "
            f"within {mesh.timeout_seconds:g} s; {reason}. Look at the ranks of that stage."
        ) from error
    return sampled


def agree_on_error(error: str | None, group: Group | None = None) -> str | None:
    """Return the error of the first rank that has one, so that either all ranks stop or none."""
    return next((text for text in gather_objects(error, group) if text is not None), None)


def barrier() -> None:
    """Wait for all ranks."""
    device = platform.current().device
    dist.barrier(device_ids=None if device.index is None else [device.index])


def send_hidden(hidden: Tensor, mesh: Mesh, *, to_stage: int) -> dist.Work | None:
    """Start sending activations to a pipeline stage; wait for the result before reusing them."""
    return dist.isend(hidden, group_dst=to_stage, group=mesh.groups.pp)


def receive_hidden(buffer: Tensor, mesh: Mesh, *, from_stage: int) -> Tensor:
    """Receive activations from a pipeline stage into a buffer; returns it."""
    dist.recv(buffer, group_src=from_stage, group=mesh.groups.pp)
    return buffer


def _reduced(value: Tensor, op: Any = dist.ReduceOp.SUM, group: Group | None = None) -> Tensor:
    result = value.clone()
    dist.all_reduce(result, op=op, group=group)
    return result


def _size(group: Group | None) -> int:
    return dist.get_world_size() if group is None else group.size()
