"""The device mesh: every degree, rank and process group of a run, in one frozen record."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

# Public, but torch's type hints do not list the store.
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from marlhf_mega import platform
from marlhf_mega.config.limits import context_multiple
from marlhf_mega.config.schema import ParallelConfig
from marlhf_mega.parallel.launch import Launch
from marlhf_mega.platform import Platform

Group = dist.ProcessGroup


def _globals_of_megatron() -> dict[str, Any]:
    """Copy Megatron's record of the groups in force: constants that it rebinds."""
    return {n: v for n, v in vars(parallel_state).items() if n[0] == "_" and n.isupper()}


_NO_GROUPS = _globals_of_megatron()


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this rank stands. Axes: tp tensor, pp pipeline, cp context, ep expert, dp data."""

    platform: Platform
    parallel: ParallelConfig
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    launch: Launch
    """The ranks of this world and, where some ranks only generate, of the other one."""
    only_generates: bool
    """Whether this world is that of the ranks that only generate."""
    groups: ProcessGroupCollection
    """Megatron-Core's groups: tp, pp, cp, ep, dp, dp_cp, embd, ..."""
    rollout_pp: Group
    """The pipeline's ranks again: carries sampled tokens while `groups.pp` carries activations."""
    timeout_seconds: float
    """How long a collective may take."""
    megatron_globals: Mapping[str, Any]
    """Megatron's own record of the groups, which some of its modules read."""

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.platform.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def num_chunks(self) -> int:
        """Model chunks on this rank (virtual pipeline stages)."""
        return self.parallel.virtual_pipeline_size

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank does what one rank of a replica has to do: rules, parsing."""
        return self.tp_rank == 0 and self.pp_rank == 0 and self.cp_rank == 0

    @property
    def is_reporter(self) -> bool:
        """Whether this rank's numbers stand for its replica's: one rank of the last stage."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def context_multiple(self) -> int:
        """Sequences are a multiple of this, so that context-parallel ranks hold two pieces each."""
        return context_multiple(self.cp_size)

    @property
    def sequence_multiple(self) -> int:
        """Rows are a multiple of this, so that ranks can share them evenly."""
        return self.context_multiple * (self.tp_size if self.parallel.sequence_parallel else 1)

    def describe(self) -> str:
        """Say the layout in one line, such as `4 ranks: TP2 x PP2 x DP1 (gloo, cpu)`."""
        parts = [f"TP{self.tp_size}", f"PP{self.pp_size}"]
        parts += [f"VPP{self.num_chunks}"] if self.num_chunks > 1 else []
        parts += [f"CP{self.cp_size}"] if self.cp_size > 1 else []
        parts += [f"EP{self.ep_size}"] if self.ep_size > 1 else []
        parts += [f"DP{self.dp_size}"]
        sp = " + SP" if self.parallel.sequence_parallel else ""
        where = f"{self.platform.backend}, {self.platform.name}"
        others = self.launch.size - self.world_size
        more = f", {others} more that {'train' if self.only_generates else 'only generate'}"
        ranks = f"{self.world_size} ranks: {' x '.join(parts)}{sp} ({where})"
        return ranks + (more if others else "")


def create_mesh(
    parallel: ParallelConfig,
    *,
    num_rollout_ranks: int = 0,
    rollout_parallel: ParallelConfig | None = None,
    timeout_seconds: float = 1800.0,
) -> Mesh:
    """Join the world, unless joined already, and build every process group. All ranks call it.

    Without torchrun's environment the world is this one process.

    Args:
        parallel: degrees; what is left of the world is data parallel.
        num_rollout_ranks: so many ranks, the last ones, become a world of their own.
        rollout_parallel: degrees of that world.
        timeout_seconds: how long a collective may take.

    Returns:
        The mesh of this rank's world as this rank sees it.
    """
    here = platform.current()
    timeout = timedelta(seconds=timeout_seconds)
    if not num_rollout_ranks:
        _join_world(here, timeout)
        return _build_mesh(parallel, here, _whole_world(here), timeout_seconds=timeout_seconds)
    launch, only_generates = _join_half(here, num_rollout_ranks, timeout)
    if only_generates and rollout_parallel is not None:
        parallel = rollout_parallel
    return _build_mesh(
        parallel, here, launch, only_generates=only_generates, timeout_seconds=timeout_seconds
    )


def _build_mesh(
    parallel: ParallelConfig,
    here: Platform,
    launch: Launch,
    *,
    only_generates: bool = False,
    timeout_seconds: float,
) -> Mesh:
    virtual = parallel.virtual_pipeline_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_size,
        expert_model_parallel_size=parallel.expert_size,
        # Experts are spread whole: gloo cannot gather the uneven pieces of a tensor-split expert.
        expert_tensor_parallel_size=1,
        # Only checkpoint formats that are not ours would use them.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(timeout_seconds / 60)),
    )
    # Megatron forks this generator around the embedding; nothing of ours draws from it.
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(
        platform=here,
        parallel=parallel,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        launch=launch,
        only_generates=only_generates,
        groups=groups,
        rollout_pp=_copy_of_pipeline_groups(groups.pp),
        timeout_seconds=timeout_seconds,
        megatron_globals=_globals_of_megatron(),
    )


def create_second_mesh(parallel: ParallelConfig, main: Mesh) -> Mesh:
    """Build groups of another layout of the same world; `main` stays in force. All ranks call it.

    Args:
        parallel: degrees of the second layout.
        main: the mesh in force.
    """
    vars(parallel_state).update(_NO_GROUPS)
    try:
        return _build_mesh(
            parallel, main.platform, main.launch, timeout_seconds=main.timeout_seconds
        )
    finally:
        vars(parallel_state).update(main.megatron_globals)


@contextmanager
def in_force(mesh: Mesh) -> Iterator[None]:
    """Let Megatron see this mesh's groups where it does not take them as arguments."""
    before = _globals_of_megatron()
    vars(parallel_state).update(mesh.megatron_globals)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def destroy_mesh(*, leave_world: bool = True) -> None:
    """Give up all groups, so that the process ends without hanging peers or warnings.

    Args:
        leave_world: a process cannot join a world again; keep it to create another mesh.
    """
    parallel_state.destroy_model_parallel()
    if leave_world:
        dist.destroy_process_group()


def world_size_from_environment() -> int:
    """Number of ranks that torchrun started; 1 without torchrun. Does not communicate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join_world(here: Platform, timeout: timedelta) -> None:
    if dist.is_initialized():
        return
    device_id = here.device if here.name == "cuda" else None
    if "RANK" in os.environ:
        dist.init_process_group(here.backend, timeout=timeout, device_id=device_id)
        return
    dist.init_process_group(
        here.backend,
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        timeout=timeout,
        device_id=device_id,
    )


def _whole_world(here: Platform) -> Launch:
    return Launch(
        group=dist.group.WORLD, rank=dist.get_rank(), size=dist.get_world_size(), device=here.device
    )


def _join_half(here: Platform, num_rollout_ranks: int, timeout: timedelta) -> tuple[Launch, bool]:
    """Make two worlds of the ranks, joined by one backend.

    Everything that speaks of the world, Megatron's groups included, then means one half. No
    ordinary process group could span both: torch numbers a group's ranks by the world's.

    Returns:
        What joins them, and whether this rank is of the half that only generates.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    num_training = size - num_rollout_ranks
    generates = rank >= num_training
    dist.init_process_group(
        here.backend,
        store=PrefixStore("rollout" if generates else "training", store),
        rank=rank - num_training if generates else rank,
        world_size=num_rollout_ranks if generates else num_training,
        timeout=timeout,
        device_id=here.device if here.name == "cuda" else None,
    )
    # Between two messages the other half does a whole step, of which every phase has its limit.
    patience, joining = timeout * 8, PrefixStore("launch", store)
    if here.name == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        backend: Any = dist.ProcessGroupNCCL(joining, rank, size, options)
    else:
        backend = dist.ProcessGroupGloo(joining, rank, size, patience)
    return Launch(group=backend, rank=rank, size=size, device=here.device), generates


def _copy_of_pipeline_groups(pipeline: Group) -> Group:
    """Every rank creates every copy, in the same order, as `new_group` demands."""
    if pipeline.size() == 1:
        return pipeline  # no tokens travel
    stride = dist.get_world_size() // pipeline.size()
    mine: Group | None = None
    for first in range(stride):
        ranks = [first + stage * stride for stage in range(pipeline.size())]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            assert ranks == dist.get_process_group_ranks(pipeline), "pipeline is the slowest axis"
            mine = group
    assert mine is not None, "every rank is in one pipeline"
    return mine
