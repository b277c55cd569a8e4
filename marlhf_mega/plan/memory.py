"""Bytes of every model in every phase, on every pipeline stage."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from marlhf_mega.config.limits import MOVE_BUCKET_BYTES, WHOLE_TENSOR_BYTES
from marlhf_mega.config.sections.hardware import MemoryConfig, PrecisionConfig
from marlhf_mega.plan.activations import (
    Formats,
    chunk_kept,
    forward_workspace,
    head_workspace,
    in_flight,
    last_workspace,
    layer_kept,
    layer_shape,
    layer_workspace,
    tail_shape,
)
from marlhf_mega.plan.buffers import buffers
from marlhf_mega.plan.generation import Generation, generation_memory, sampling_bytes
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.parameters import (
    Parameter,
    count,
    largest_stage,
    learning,
    stage_parameters,
    whole_model_size,
)
from marlhf_mega.plan.workload import GENERATING_ROLES, MicrobatchShape, Role, Workload

WORKING = ("activations", "backward", "forward", "prefill and sampling")
"""Memory of passes: estimates, which a measured run can correct. All else is exact."""

_FLOAT32 = 4
_MOMENTS = 2
_STEP_COUNTER = 4
_ONE_WAY = MOVE_BUCKET_BYTES // 2
"""Resharding buckets on a rank that only sends, or only receives."""


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Bytes of one model on a rank while it is on the device."""

    num_parameters: int
    weights: int
    fp8_copies: int
    """FP8 copies of bfloat16 weights."""
    gradients: int
    optimizer: int
    """Adam's moments and, with bfloat16 weights, float32 master weights: on the rank with most."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.fp8_copies + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of one rank of a pipeline stage."""

    stage: int
    only_generates: bool = False
    """Whether it is a stage of the ranks that only generate; others train."""
    roles: Mapping[str, RoleMemory]
    phases: Mapping[str, Mapping[str, int]]
    """Phase -> part -> bytes."""

    def corrected(self, factor: float) -> Self:
        """Return it with activations that are larger by a factor."""
        phases = {
            phase: {n: int(size * factor) if n in WORKING else size for n, size in held.items()}
            for phase, held in self.phases.items()
        }
        return replace(self, phases=phases)

    def total(self, phase: str) -> int:
        """Bytes at the phase's peak."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes of the worst phase."""
        return max(map(self.total, self.phases))

    @property
    def worst_phase(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=self.total)

    @property
    def where(self) -> str:
        """The stage and its worst phase, as text."""
        if self.only_generates:
            return f"rollout rank of stage {self.stage}"
        return f"stage {self.stage}, {self.worst_phase}"


def formats_of(precision: PrecisionConfig, *, on_gpu: bool, has_engine: bool) -> Formats:
    """Return the sizes of number formats.

    Args:
        precision: of the run.
        on_gpu: whether it runs on GPUs, for `auto`.
        has_engine: whether Transformer Engine is installed.
    """
    single = precision.dtype == "float32" or (precision.dtype == "auto" and not on_gpu)
    return Formats(
        element=4 if single else 2,
        has_engine=has_engine and on_gpu,
        fp8=precision.fp8 != "off",
        on_cpu=not on_gpu,
    )


def stage_memory(work: Workload, stage: int, formats: Formats) -> StageMemory:
    """Return the memory of the training ranks of one stage in every phase.

    Args:
        work: the job.
        stage: pipeline stage, from 0.
        formats: number formats.
    """
    precision = work.config.precision
    roles = {
        role.name: role_memory(role, work.layout, stage, formats, precision) for role in work.roles
    }
    phases = {"update": _update(work, stage, formats, roles)}
    if work.job == "ppo":
        phases = {
            "rollout": _rollout(work, formats, roles),
            "experience": _experience(work, stage, formats, roles),
        } | phases
    if work.num_rollout_ranks and work.config.data.validation_path is not None:
        # Ranks that train generate in no other phase.
        resident = _resident(roles, work.config.memory, "rollout")
        generation = Generation.of_evaluation(work)
        phases["evaluate"] = resident | generation_memory(
            work, generation, formats, for_training=False
        )
    sleeps = work.config.rollout.engine == "vllm"
    if work.config.moves_weights and work.policy.model.lora.is_on and not sleeps:
        # Only adapters travel in each rollout: the rest of the second copy stays.
        kept = _second_policy(work, formats) - _second_policy(work, formats, only_learning=True)
        for phase in phases.keys() - {"rollout"}:
            phases[phase] = phases[phase] | {"policy in the rollout layout": kept}
    cache = max(held.get("kv cache", 0) for held in phases.values())
    if work.config.rollout.cuda_graphs and cache:
        # Graphs are kept, and with them what they read and write. One model's draw the tokens too.
        kind = Generation.of_evaluation if work.num_rollout_ranks else Generation.of_rollout
        drawn = sampling_bytes(work, kind(work), formats) if work.num_generating == 1 else 0
        kept_always = {"kv cache": cache, "graphs": drawn}
        phases = {phase: kept_always | held for phase, held in phases.items()}
    return StageMemory(stage=stage, roles=roles, phases=phases)


def _engine_policy(work: Workload, formats: Formats) -> int:
    """Return the bytes of the policy in a vLLM engine, which splits experts too."""
    ranks = work.config.rollout_parallel.tensor_size
    return formats.element * whole_model_size(work.policy.model, "language") // ranks


def _second_policy(work: Workload, formats: Formats, *, only_learning: bool = False) -> int:
    """Return the bytes of the policy at the rollout's layout; the largest stage counts."""
    layout = Generation.of_rollout(work).layout
    model = work.policy.model
    return formats.element * largest_stage(model, layout, "language", only_learning=only_learning)


def rollout_rank_memory(work: Workload, stage: int, formats: Formats) -> StageMemory:
    """Return the memory of ranks that only generate: the policy and its cache.

    Args:
        work: a job with such ranks.
        stage: stage of their own pipeline, from 0.
        formats: number formats.
    """
    generation = Generation.of_rollout(work)
    # It is not trained, but computes in the formats of the policy that is.
    precision = work.config.precision.model_copy(update={"fp8_frozen": True})
    still = replace(work.policy, learns=False)
    roles = {"policy": role_memory(still, generation.layout, stage, formats, precision)}
    held = _resident(roles, work.config.memory, "rollout") | {"resharding buckets": _ONE_WAY}
    if generation.by_engine:
        held["whole tensors"] = WHOLE_TENSOR_BYTES
    phases = {"rollout": held | generation_memory(work, generation, formats)}
    return StageMemory(stage=stage, only_generates=True, roles=roles, phases=phases)


def role_memory(
    role: Role, layout: WorldLayout, stage: int, formats: Formats, precision: PrecisionConfig
) -> RoleMemory:
    """Return the memory of one model on a rank of a stage."""
    chunks = stage_parameters(role.model, layout, head=role.head, stage=stage)
    products = sum(p.size for chunk in chunks for p in chunk if p.is_product)
    if role.shares_base:
        chunks = learning(chunks)
    own = precision if role.learns else precision.frozen()
    if role.is_policy:
        return RoleMemory(num_parameters=0, weights=0, fp8_copies=0, gradients=0, optimizer=0)
    if not role.learns:
        return RoleMemory(
            num_parameters=count(chunks),
            weights=count(chunks) * formats.element,
            fp8_copies=products if own.fp8 != "off" else 0,
            gradients=0,
            optimizer=0,
        )
    trained = learning(chunks)
    still = (count(chunks) - count(trained)) * formats.element
    groups = _by_format(trained, split=own.fp8_param_gather and own.fp8 != "off")
    laid_out = [(buffers(group, layout, stage=stage), size) for group, size in groups]
    masters = _FLOAT32 if formats.element < _FLOAT32 else 0
    counters = 0 if formats.has_engine else _STEP_COUNTER
    states = [
        sum(
            (masters + _MOMENTS * _FLOAT32) * b.owned[rank] + counters * b.owned_tensors[rank]
            for b, _ in laid_out
        )
        for rank in range(layout.world // layout.pipeline)
    ]
    return RoleMemory(
        num_parameters=count(chunks),
        weights=still + sum(b.num_elements * (size or formats.element) for b, size in laid_out),
        # One copy and its transpose; with FP8 weights the former is the weight itself.
        fp8_copies=products * (1 if own.fp8_param_gather else 2) if own.fp8 != "off" else 0,
        gradients=sum(b.num_elements for b, _ in laid_out) * _FLOAT32,
        optimizer=max(states),
    )


def _resident(roles: Mapping[str, RoleMemory], memory: MemoryConfig, phase: str) -> dict[str, int]:
    """Return the memory of models in a phase."""
    away = _idle(roles, phase) if memory.offload_idle else set()
    found: dict[str, int] = {}
    for name, role in roles.items():
        # FP8 copies are not offloaded with the weights.
        found[f"{name} weights"] = role.fp8_copies + (0 if name in away else role.weights)
        if role.optimizer and (phase == "update" or not memory.offload_optimizer):
            found[f"{name} gradients"] = role.gradients
            found[f"{name} optimizer"] = role.optimizer
    return found


def _idle(roles: Mapping[str, RoleMemory], phase: str) -> set[str]:
    """Return the models that are offloaded at the peak of a phase."""
    stay = {*GENERATING_ROLES}
    match phase:
        case "update":
            return {name for name, role in roles.items() if not role.optimizer} - stay
        case "rollout":
            return set(roles) - stay
    rewards = {name for name, role in roles.items() if not role.optimizer} - {"reference"} - stay
    groups = ({"reference"} & roles.keys(), {"critic"} & roles.keys(), rewards)
    # They are loaded one after the other, the reward models together: the largest counts.
    largest = max(groups, key=lambda names: sum(roles[name].weights for name in names))
    return set(roles) - stay - largest


def _rollout(work: Workload, formats: Formats, roles: Mapping[str, RoleMemory]) -> dict[str, int]:
    config, generation = work.config, Generation.of_rollout(work)
    found = _resident(roles, config.memory, "rollout")
    if work.num_rollout_ranks:
        return found | {"resharding buckets": _ONE_WAY}
    if config.rollout.engine == "vllm":
        found["policy in the engine"] = _engine_policy(work, formats)
        found["whole tensors and buckets"] = WHOLE_TENSOR_BYTES + MOVE_BUCKET_BYTES
    # A rank's stage may differ between the two layouts: the largest stage counts.
    elif config.moves_weights:
        found["policy in the rollout layout"] = _second_policy(work, formats)
        found["resharding buckets"] = MOVE_BUCKET_BYTES
    return found | generation_memory(work, generation, formats)


def _experience(
    work: Workload, stage: int, formats: Formats, roles: Mapping[str, RoleMemory]
) -> dict[str, int]:
    found = _resident(roles, work.config.memory, "experience")
    last = stage == work.layout.pipeline - 1
    peaks = []
    for role in (r for r in work.roles if r.name != "mask"):
        shape = layer_shape(role, work.layout, work.scoring, formats)
        filtered = role.name == "policy" and work.config.rollout.is_filtered
        head = head_workspace(shape, role.head, backward=False, filtered=filtered) if last else 0
        peaks.append(max(forward_workspace(shape), head) + shape.residual * formats.element)
    found["forward"] = max(peaks)
    found["experience"] = 10 * _FLOAT32 * work.batch_sequences * work.microbatch.response
    found["messages"] = _messages(work, work.scoring, formats)
    return found


def _update(
    work: Workload, stage: int, formats: Formats, roles: Mapping[str, RoleMemory]
) -> dict[str, int]:
    found = _resident(roles, work.config.memory, "update")
    if work.job == "ppo":
        found["experience"] = 10 * _FLOAT32 * work.batch_sequences * work.microbatch.response
    kept, extra = max(
        (update_activations(work, role, stage, formats) for role in work.roles if role.learns),
        key=sum,
    )
    if not (formats.has_engine or formats.on_cpu):
        # Torch's Adam needs another float32 value for each parameter that it keeps state of.
        states = max(role.optimizer for role in roles.values())
        extra = max(extra, states // (2 if formats.element == _FLOAT32 else 3) - kept)
    found["activations"] = kept
    found["backward"] = extra
    found["messages"] = _messages(work, work.microbatch, formats)
    return found


def _messages(work: Workload, microbatch: MicrobatchShape, formats: Formats) -> int:
    """Received activations: gathered sequences, and those of the neighbouring stage."""
    layout, hidden = work.layout, work.policy.model.hidden_size
    whole = microbatch.tokens // layout.context * hidden * formats.element
    gathered = whole if layout.sequence_share > 1 else 0
    return gathered + (whole // layout.sequence_share if layout.pipeline > 1 else 0)


def update_activations(work: Workload, role: Role, stage: int, formats: Formats) -> tuple[int, int]:
    """Return the peak bytes saved for backward passes, and what one such pass needs besides.

    Args:
        work: the job.
        role: the model that is trained.
        stage: pipeline stage.
        formats: number formats.
    """
    layout, memory = work.layout, work.config.memory
    shape = layer_shape(role, layout, work.microbatch, formats)
    first, last = stage == 0, stage == layout.pipeline - 1
    flying = in_flight(layout, stage=stage, num_microbatches=work.num_microbatches)
    chunk = chunk_kept(
        shape,
        memory,
        first=first and layout.chunks == 1,
        last=last and layout.chunks == 1,
        head=role.head,
    )
    kept = flying * chunk
    if last and layout.chunks > 1:
        inner = chunk_kept(shape, memory, first=False, last=False, head=role.head)
        outer = chunk_kept(shape, memory, first=False, last=True, head=role.head)
        kept += outer - inner
    again = 0
    if memory.recompute == "full":  # what a layer saves, its output and that output's gradient
        again = layer_kept(shape, memory) + 2 * shape.residual * formats.element
    if not last:
        return kept, layer_workspace(shape) + again
    filtered = role.name == "policy" and work.config.rollout.is_filtered
    head = head_workspace(tail_shape(shape), role.head, backward=True, filtered=filtered)
    return kept, max(head, last_workspace(shape) + again)


def _by_format(
    chunks: list[tuple[Parameter, ...]], *, split: bool
) -> list[tuple[list[list[Parameter]], int | None]]:
    """Split a rank's parameters by bytes per element; None means the run's."""
    if not split:
        return [([list(chunk) for chunk in chunks], None)]
    return [
        ([[p for p in chunk if p.is_product == fp8] for chunk in chunks], 1 if fp8 else None)
        for fp8 in (True, False)
    ]
