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
from marlhf_mega.config.limits import context_multiple, describe_layout
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.launch import Launch
from marlhf_mega.platform import Platform

Group = dist.ProcessGroup


def _globals_of_megatron() -> dict[str, Any]:
    """Copy Megatron's record of the current groups: module constants that it rebinds."""
    return {n: v for n, v in vars(parallel_state).items() if n[0] == "_" and n.isupper()}


_NO_GROUPS = _globals_of_megatron()


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's mesh. Axes: tp tensor, pp pipeline, cp context, ep expert, dp data.

    Data-parallel size = world / (TP x PP x CP).
    """

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
    """The ranks of this world and, with disaggregated rollouts, of the other one."""
    only_generates: bool
    """Whether this is the world of disaggregated rollout ranks."""
    groups: ProcessGroupCollection
    """Megatron-Core's groups: tp, pp, cp, ep, dp, dp_cp, embd, ..."""
    rollout_pp: Group
    """The same ranks as `groups.pp`: carries sampled tokens while that carries activations."""
    timeout_seconds: float
    """Longest time that a collective may take."""
    megatron_globals: Mapping[str, Any]
    """Megatron's own record of the groups, see `use_mesh`."""

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
        """Number of model chunks on this rank (virtual pipeline stages)."""
        return self.parallel.virtual_pipeline_size

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank does work that one rank per replica does: rule rewards, parsing."""
        return self.tp_rank == 0 and self.pp_rank == 0 and self.cp_rank == 0

    @property
    def reports_metrics(self) -> bool:
        """Whether this rank reports its replica's metrics: one rank of the last stage does."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def context_multiple(self) -> int:
        """Sequence lengths are a multiple of this, for zigzag sharding."""
        return context_multiple(self.cp_size)

    @property
    def sequence_multiple(self) -> int:
        """Lengths of `[batch, seq]` rows are a multiple of this, so that ranks get equal shards."""
        return self.context_multiple * (self.tp_size if self.parallel.sequence_parallel else 1)

    def describe(self) -> str:
        """Describe the layout in one line, such as `4 ranks: TP2 x PP2 x DP1 (gloo, cpu)`."""
        sizes = {"TP": self.tp_size, "PP": self.pp_size, "VPP": self.num_chunks}
        sizes |= {"CP": self.cp_size, "EP": self.ep_size, "DP": self.dp_size}
        layout = describe_layout(sizes, sequence_parallel=self.parallel.sequence_parallel)
        where = f"{self.platform.backend}, {self.platform.name}"
        others = self.launch.size - self.world_size
        more = f", {others} more that {'train' if self.only_generates else 'only generate'}"
        ranks = f"{self.world_size} ranks: {layout} ({where})"
        return ranks + (more if others else "")


def create_mesh(
    parallel: ParallelConfig,
    *,
    num_rollout_ranks: int = 0,
    rollout_parallel: ParallelConfig | None = None,
    timeout_seconds: float = 1800.0,
) -> Mesh:
    """Join the world, unless joined already, and create every process group. All ranks call it.

    Without torchrun's environment the world is this one process.

    Args:
        parallel: degrees of parallelism; data-parallel size = world / (TP x PP x CP).
        num_rollout_ranks: this many of the last ranks form a world of their own (disaggregated
            rollouts).
        rollout_parallel: degrees of that world; None means `parallel`.
        timeout_seconds: longest time that a collective may take.

    Returns:
        This rank's mesh, of the world that it belongs to.
    """
    here = platform.current()
    timeout = timedelta(seconds=timeout_seconds)
    if not num_rollout_ranks:
        _join_world(here, timeout)
        rank, size = dist.get_rank(), dist.get_world_size()
        launch = Launch(group=dist.group.WORLD, rank=rank, size=size, device=here.device)
        return _build_mesh(parallel, here, launch, timeout_seconds=timeout_seconds)
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
    with _one_group_per_set_of_ranks():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_size,
            pipeline_model_parallel_size=parallel.pipeline_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_size,
            expert_model_parallel_size=parallel.expert_size,
            # Experts are not sharded by tensor parallelism: gloo cannot gather the uneven shards.
            expert_tensor_parallel_size=1,
            # Only checkpoint formats that we do not use need them.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, int(timeout_seconds / 60)),
        )
    # Megatron forks this generator around the embedding; our code never draws from it.
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
        rollout_pp=_copy_of_pipeline_groups(groups.pp, timedelta(seconds=timeout_seconds)),
        timeout_seconds=timeout_seconds,
        megatron_globals=_globals_of_megatron(),
    )


@contextmanager
def _one_group_per_set_of_ranks() -> Iterator[None]:
    """Let Megatron's groups of the same ranks be one group; by itself it makes one for every use.

    All ranks of the world take part in the creation of a group, so that its name is the same on
    all of them; only of a group of one rank the others need not know.
    """
    create, made = parallel_state.create_group, dict[tuple[int, ...], Any]()

    def create_once(ranks: list[int], **options: Any) -> Any:
        key, alone = tuple(ranks), len(ranks) == 1
        if key not in made and not (alone and ranks != [dist.get_rank()]):
            made[key] = create(ranks, use_local_synchronization=alone, **options)
        return made.get(key)

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


def create_second_mesh(parallel: ParallelConfig, main: Mesh) -> Mesh:
    """Create a mesh with another layout of the same world. All ranks call it.

    Args:
        parallel: degrees of the second layout.
        main: the first mesh, which stays Megatron's current one.
    """
    vars(parallel_state).update(_NO_GROUPS)
    try:
        return _build_mesh(
            parallel, main.platform, main.launch, timeout_seconds=main.timeout_seconds
        )
    finally:
        vars(parallel_state).update(main.megatron_globals)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Make this mesh Megatron's current one, for modules that do not take groups as arguments."""
    before = _globals_of_megatron()
    vars(parallel_state).update(mesh.megatron_globals)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def destroy_mesh(*, leave_world: bool = True) -> None:
    """Destroy all groups, so that the process ends without warnings and no peer hangs.

    Args:
        leave_world: leave the world too; False to create another mesh in it, since a process
            cannot join a world again.
    """
    parallel_state.destroy_model_parallel()
    if leave_world:
        dist.destroy_process_group()


def _join_world(here: Platform, timeout: timedelta) -> None:
    if dist.is_initialized():
        return
    # Without a device id, communicators are made at a group's first use: many have none.
    if "RANK" in os.environ:
        dist.init_process_group(here.backend, timeout=timeout)
        return
    dist.init_process_group(
        here.backend,
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        timeout=timeout,
    )


def _join_half(here: Platform, num_rollout_ranks: int, timeout: timedelta) -> tuple[Launch, bool]:
    """Join one of two worlds, which together hold all ranks and are connected by one backend.

    Torch's world, and so Megatron's groups, then cover one half only. An ordinary process group
    cannot span both halves, because torch numbers a group's ranks by those of the world.

    Returns:
        The launch that spans both, and whether this rank belongs to the half that only generates.
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
    )
    # Between two messages the other half may do a whole step, whose phases have their own limits.
    patience, joining = timeout * 8, PrefixStore("launch", store)
    if here.name == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        backend: Any = dist.ProcessGroupNCCL(joining, rank, size, options)
    else:
        backend = dist.ProcessGroupGloo(joining, rank, size, patience)
    return Launch(group=backend, rank=rank, size=size, device=here.device), generates


def _copy_of_pipeline_groups(pipeline: Group, timeout: timedelta) -> Group:
    """Return a second group of this pipeline's ranks; all ranks create all copies in one order."""
    if pipeline.size() == 1:
        return pipeline  # nothing is sent
    stride = dist.get_world_size() // pipeline.size()
    mine: Group | None = None
    for first in range(stride):
        ranks = [first + stage * stride for stage in range(pipeline.size())]
        group = dist.new_group(ranks, timeout=timeout, group_desc="rollout_pp")
        if dist.get_rank() in ranks:
            assert ranks == dist.get_process_group_ranks(pipeline), "pipeline is the slowest axis"
            mine = group
    assert mine is not None, "every rank is in one pipeline"
    return mine
