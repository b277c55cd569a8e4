"""The whole plan of a job on a cluster: does it fit, how fast, what to save, what to change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.activations import Formats
from marlhf_mega.plan.checkpoints import CheckpointPlan, Reliability, checkpoint_plan
from marlhf_mega.plan.gpus import GIB, Gpu
from marlhf_mega.plan.memory import StageMemory, formats_of, stage_memory
from marlhf_mega.plan.timing import Efficiencies, bubble, step_seconds
from marlhf_mega.plan.workload import Workload, microbatch_keys, workload


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
    seconds: Mapping[str, float]
    checkpoints: CheckpointPlan

    @property
    def worst(self) -> StageMemory:
        """The stage whose ranks need the most."""
        return max(self.stages, key=lambda stage: stage.peak)

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
        return sum(self.seconds.values())

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
        ConfigError: the job has no plan, or its layout does not fit the model or the cluster.
    """
    if config.precision.fp8 != "off" and not cluster.gpu.has_fp8:
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: {cluster.gpu.name} has no FP8. Set it to off, "
            "or plan for H100."
        )
    work = workload(config, job, cluster.world_size)
    formats = formats_of(config.precision, on_gpu=True, has_engine=cluster.has_engine)
    stages = tuple(
        stage_memory(work, stage, formats, activation_factor=cluster.activation_factor)
        for stage in range(work.layout.pipeline)
    )
    seconds = step_seconds(work, cluster.gpu, formats, cluster.rates)
    return Plan(
        work=work,
        cluster=cluster,
        formats=formats,
        stages=stages,
        seconds=seconds,
        checkpoints=checkpoint_plan(
            work,
            nodes=cluster.nodes,
            element=formats.element,
            step_seconds=sum(seconds.values()),
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


def smallest_change(plan: Plan) -> tuple[dict[str, Any], Plan] | None:
    """Return the first change, from cheap to dear, after which the job fits; none: none does."""
    for keys in _changes(plan):
        try:
            config = with_keys(plan.work.config, keys)
            changed = make_plan(config, plan.work.job, plan.cluster)
        except ConfigError:
            continue
        if changed.fits:
            return keys, changed
    return None


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """List changes that need no other machine: one key, then several, then another layout."""
    config, layout = plan.work.config, plan.work.layout
    singles: list[dict[str, Any]] = []
    if layout.tensor > 1 and not layout.sequence_parallel:
        singles.append({"parallel.sequence_parallel": True})
    if config.memory.recompute == "none" and config.model.attention_softcap is not None:
        singles.append({"memory.recompute": "selective"})
    size = plan.work.microbatch.rows
    while size > 1:
        size //= 2
        seq = plan.work.microbatch.seq
        singles.append(microbatch_keys(config, plan.work.job, rows=size, seq=seq))
    if plan.work.job == "ppo":
        slots = config.rollout.slots or config.rollout.batch_size // layout.data
        while slots > 8:
            slots //= 2
            singles.append({"rollout.slots": slots})
    if plan.work.job == "ppo" and not config.precision.fp8_param_gather:
        offload = ("offload_idle", "offload_optimizer")
        singles += [{f"memory.{k}": True} for k in offload if not getattr(config.memory, k)]
    if config.memory.recompute != "full":
        singles.append({"memory.recompute": "full", "memory.recompute_num_layers": None})
    yield from singles
    everything: dict[str, Any] = {}
    for change in singles:
        everything |= change
        yield dict(everything)
    for tensor, pipeline in _larger_layouts(plan):
        keys = {
            "parallel.tensor_size": tensor,
            "parallel.pipeline_size": pipeline,
            "parallel.sequence_parallel": tensor > 1,
        }
        yield keys
        yield everything | keys


def _larger_layouts(plan: Plan) -> list[tuple[int, int]]:
    """Layouts that cut the model into more pieces, the fewest first; tensors inside a machine."""
    layout, cluster = plan.work.layout, plan.cluster
    now = layout.tensor * layout.pipeline
    found = [
        (tensor, pipeline)
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8, 16)
        if tensor <= cluster.gpus_per_node
        and now < tensor * pipeline <= cluster.world_size
        and cluster.world_size % (tensor * pipeline) == 0
    ]
    return sorted(found, key=lambda pair: (pair[0] * pair[1], pair[1]))
