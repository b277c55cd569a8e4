"""The plan of a job on a cluster: memory, time and checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from marlhf_mega.config.checks import check_sizes
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.activations import Formats
from marlhf_mega.plan.checkpoints import CheckpointPlan, Reliability, checkpoint_plan
from marlhf_mega.plan.generation import Generation
from marlhf_mega.plan.gpus import Gpu
from marlhf_mega.plan.host import HostMemory, host_memory
from marlhf_mega.plan.memory import StageMemory, formats_of, rollout_rank_memory, stage_memory
from marlhf_mega.plan.timing import Efficiencies, besides_steps, bubble, step_seconds, whole_step
from marlhf_mega.plan.workload import Workload, workload


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines, and assumptions about them."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    has_engine: bool = True
    """Whether Transformer Engine is installed."""
    reserved: int = 3 * GIB
    """Bytes for the CUDA context, NCCL channels and workspaces of matrix libraries."""
    fragmentation: float = 0.04
    """Share of the rest that is lost to fragmentation in the allocator."""
    rates: Efficiencies = field(default_factory=Efficiencies)
    reliability: Reliability = field(default_factory=Reliability)
    activation_factor: float = 1.0
    """Ratio of measured to predicted activations, from a run (`--calibrate`)."""

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
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
    """Of the ranks that only generate; empty without such ranks."""
    seconds: Mapping[str, float]
    besides: Mapping[str, float]
    """Seconds of what is not in every step, see `besides_steps`."""
    checkpoints: CheckpointPlan
    host: HostMemory

    @property
    def worst(self) -> StageMemory:
        """The stage, of either kind of ranks, that needs the most memory."""
        return max((*self.stages, *self.rollout_stages), key=lambda stage: stage.peak)

    @property
    def spare(self) -> int:
        """Bytes left on the worst rank; negative if it lacks memory."""
        return self.cluster.usable - self.worst.peak

    @property
    def fits(self) -> bool:
        """Whether the worst rank has enough memory."""
        return self.spare >= 0

    @property
    def step_seconds(self) -> float:
        """Estimated time of one step."""
        return whole_step(self.work, self.seconds)

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline in an update, relative to its work."""
        return bubble(self.work.layout, self.work.num_microbatches)


def make_plan(config: Config, job: str, cluster: Cluster) -> Plan:
    """Plan a job.

    Args:
        config: with the vocabulary size.
        job: sft, reward, preference or ppo.
        cluster: where it would run.

    Raises:
        ConfigError: the job cannot be planned, or violates a rule that is checked at start
            (files are not checked).
    """
    if config.precision.fp8 != "off" and not cluster.gpu.has_fp8:
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: {cluster.gpu.name} has no FP8. Set it to off, "
            "or plan for H100."
        )
    work = workload(config, job, cluster.world_size, on_gpu=True)
    check_sizes(config, work.job, work.layout.data)
    formats = formats_of(config.precision, on_gpu=True, has_engine=cluster.has_engine)
    factor = cluster.activation_factor
    stages = tuple(
        stage_memory(work, stage, formats).corrected(factor)
        for stage in range(work.layout.pipeline)
    )
    rollout_stages = tuple(
        rollout_rank_memory(work, stage, formats).corrected(factor)
        for stage in range(Generation.of_rollout(work).layout.pipeline)
        if work.num_rollout_ranks
    )
    seconds = step_seconds(work, cluster.gpu, formats, cluster.rates)
    checkpoints = checkpoint_plan(
        work,
        nodes=-(-work.layout.world // cluster.gpus_per_node),
        element=formats.element,
        step_seconds=whole_step(work, seconds),
        rates=cluster.reliability,
    )
    return Plan(
        work=work,
        cluster=cluster,
        formats=formats,
        stages=stages,
        rollout_stages=rollout_stages,
        seconds=seconds,
        besides=besides_steps(work, seconds, cluster.gpu, cluster.rates),
        checkpoints=checkpoints,
        host=host_memory(
            work,
            stages,
            gpus_per_node=cluster.gpus_per_node,
            checkpoint_bytes=checkpoints.num_bytes,
            element=formats.element,
        ),
    )
