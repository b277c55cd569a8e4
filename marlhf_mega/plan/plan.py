"""The whole plan of a job on a cluster: does it fit, how fast, what to save, what to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marlhf_mega.config.checks import check_sizes
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.activations import Formats
from marlhf_mega.plan.checkpoints import CheckpointPlan, Reliability, checkpoint_plan
from marlhf_mega.plan.generation import Generation
from marlhf_mega.plan.gpus import GIB, Gpu
from marlhf_mega.plan.memory import StageMemory, formats_of, rollout_rank_memory, stage_memory
from marlhf_mega.plan.timing import Efficiencies, bubble, step_seconds, whole_step
from marlhf_mega.plan.workload import Workload, workload


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines, and what is taken to be true of them."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    has_engine: bool = True
    """Transformer Engine is installed."""
    reserved: int = 3 * GIB
    """Bytes of the CUDA context, NCCL's channels and matrix libraries' workspaces."""
    fragmentation: float = 0.04
    """Share of the rest that the allocator cannot use."""
    rates: Efficiencies = field(default_factory=Efficiencies)
    reliability: Reliability = field(default_factory=Reliability)
    activation_factor: float = 1.0
    """Measured over predicted activations, from a run (`--calibrate`)."""

    @property
    def world_size(self) -> int:
        """Ranks: one per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes for tensors on one GPU."""
        return int((self.gpu.memory - self.reserved) * (1 - self.fragmentation))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job on a cluster."""

    work: Workload
    cluster: Cluster
    formats: Formats
    stages: tuple[StageMemory, ...]
    """Of the ranks that train."""
    rollout_stages: tuple[StageMemory, ...]
    """Of the ranks that only generate; empty where there are none."""
    seconds: Mapping[str, float]
    checkpoints: CheckpointPlan

    @property
    def worst(self) -> StageMemory:
        """The stage whose ranks, of either kind, need the most."""
        return max((*self.stages, *self.rollout_stages), key=lambda stage: stage.peak)

    @property
    def spare(self) -> int:
        """Bytes left on the worst rank; negative: what is missing."""
        return self.cluster.usable - self.worst.peak

    @property
    def fits(self) -> bool:
        """Whether the worst rank has room."""
        return self.spare >= 0

    @property
    def step_seconds(self) -> float:
        """Of one step, estimated."""
        return whole_step(self.work, self.seconds)

    @property
    def bubble(self) -> float:
        """Share of idle pipeline time in an update."""
        return bubble(self.work.layout, self.work.num_microbatches)


def make_plan(config: Config, job: str, cluster: Cluster) -> Plan:
    """Plan a job.

    Args:
        config: with the vocabulary size.
        job: sft, reward or ppo.
        cluster: where it would run.

    Raises:
        ConfigError: the job has no plan, or breaks a rule that a start checks, missing files
            apart.
    """
    if config.precision.fp8 != "off" and not cluster.gpu.has_fp8:
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: {cluster.gpu.name} has no FP8. Set it to off, "
            "or plan for H100."
        )
    work = workload(config, job, cluster.world_size)
    check_sizes(config, work.job, work.layout.data)
    formats = formats_of(config.precision, on_gpu=True, has_engine=cluster.has_engine)
    factor = cluster.activation_factor
    stages = tuple(
        stage_memory(work, stage, formats, activation_factor=factor)
        for stage in range(work.layout.pipeline)
    )
    rollout_stages = tuple(
        rollout_rank_memory(work, stage, formats, activation_factor=factor)
        for stage in range(Generation.of_rollout(work).layout.pipeline)
        if work.num_rollout_ranks
    )
    seconds = step_seconds(work, cluster.gpu, formats, cluster.rates)
    return Plan(
        work=work,
        cluster=cluster,
        formats=formats,
        stages=stages,
        rollout_stages=rollout_stages,
        seconds=seconds,
        checkpoints=checkpoint_plan(
            work,
            nodes=-(-work.layout.world // cluster.gpus_per_node),
            element=formats.element,
            step_seconds=whole_step(work, seconds),
            rates=cluster.reliability,
        ),
    )


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return the configuration with some dotted keys changed.

    Raises:
        ConfigError: the result is not valid.
    """
    values = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValueError as error:
        raise ConfigError(str(error)) from None
