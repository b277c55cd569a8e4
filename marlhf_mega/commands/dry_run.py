"""`--dry-run`: build every distinct rank of a job on the meta device and report what it holds.

Ranks with the same tensor- and pipeline-parallel rank build the same, so one replica stands for
all replicas, and another one for all ranks that only generate. Nothing communicates, and no weight
is allocated or read. What the real classes build is compared with the planner's closed form.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from marlhf_mega.checkpoint.hf.parameters import find_shards, local_parameters
from marlhf_mega.checkpoint.sharded import bytes_to_write
from marlhf_mega.checkpoint.weights import layout_of, table_of
from marlhf_mega.config.checks import Job, check_sizes
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import MemoryConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.models.shared_base import build_on_base, unshared_parameters
from marlhf_mega.models.spec import compute_dtype, transformer_config
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.parallel.mesh import Mesh, create_second_mesh, use_mesh
from marlhf_mega.plan.activations import Formats, in_flight
from marlhf_mega.plan.buffers import buffers
from marlhf_mega.plan.generation import Generation, kv_cache_bytes
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.parameters import count, learning, stage_parameters
from marlhf_mega.plan.timing import bubble
from marlhf_mega.plan.workload import Role, Workload, workload
from marlhf_mega.rollout.decoder import ChunkDecoder


@dataclass(kw_only=True)
class _Found:
    """What the ranks built so far hold."""

    parameters: dict[str, Counter[int]] = field(default_factory=dict)
    """Role -> stage -> parameters of a rank."""
    buckets: dict[str, Counter[int]] = field(default_factory=dict)
    """Role -> stage -> elements of a rank's buckets."""
    checkpoint_bytes: Counter[str] = field(default_factory=Counter)
    """Role -> bytes that one replica writes."""
    tensors: set[str] = field(default_factory=set)
    """Names in the policy's Hugging Face export."""
    layouts: set[str] = field(default_factory=set)
    num_ranks: int = 0
    """Distinct ranks."""
    kv_cache_bytes: int = 0
    """Of each rank that generates."""
    problems: list[str] = field(default_factory=list)


def dry_run(config: Config, job: Job, world_size: int) -> tuple[list[str], list[str]]:
    """Build every distinct rank of a job in this process, without allocating memory.

    Args:
        config: with the vocabulary size.
        job: sft, reward, preference or ppo.
        world_size: number of ranks.

    Returns:
        The lines of the report, and one line per problem.

    Raises:
        ValueError: sizes or layout break a rule.
    """
    start = time.perf_counter()
    check_sizes(config, job, workload(config, job, world_size).layout.data)
    # FP8 changes no shape, and its modules need a GPU: only its settings are checked.
    plain = config.precision.model_copy(update={"fp8": "off"})
    work = workload(config.model_copy(update={"precision": plain}), job, world_size)
    found = _Found()
    for rank in _distinct_ranks(work.layout, found):
        with fake_mesh(config.parallel, rank=rank, world_size=work.layout.world) as mesh:
            found.layouts.add(mesh.describe())
            policy: list[StageModel] = []
            for role in (r for r in work.roles if not r.is_policy):
                precision = config.precision if role.learns else config.precision.frozen()
                transformer_config(role.model, precision, mesh, config.memory)
                built = _build(role, work, mesh, found, policy)
                policy = policy or built
            if job == "ppo" and not work.num_rollout_ranks:
                _build_rollout(work, mesh, found)
    if work.num_rollout_ranks:
        _build_rollout_ranks(work, config, found)
    seconds = time.perf_counter() - start
    lines = _report(work, found, seconds)
    if config.precision.fp8 != "off":
        lines.append("FP8: its settings are valid; its modules need a GPU and were not built")
    return lines, found.problems


def _distinct_ranks(layout: WorldLayout, found: _Found) -> list[int]:
    """Return the first replica's ranks: tensor-parallel neighbours, stage after stage."""
    stage_size = layout.world // layout.pipeline
    ranks = [
        stage * stage_size + place
        for stage in range(layout.pipeline)
        for place in range(layout.tensor)
    ]
    found.num_ranks += len(ranks)
    return ranks


def _build(
    role: Role, work: Workload, mesh: Mesh, found: _Found, policy: Sequence[StageModel]
) -> list[StageModel]:
    """Build a role, and compare what it has with its plan; the policy is the first."""
    config, stage = work.config, mesh.pp_rank
    settings, memory = (role.model, config.precision, mesh), config.memory
    planned = stage_parameters(role.model, work.layout, head=role.head, stage=stage)
    if role.shares_base:
        chunks = build_on_base(policy, *settings, memory=memory)
        planned = learning(planned)
    else:
        chunks = build_chunks(*settings, head=role.head, memory=memory)
    # A base that is the policy's has been counted.
    built = sum(p.numel() for p in unshared_parameters(chunks, policy))
    _compare(found, f"{role.name}, rank {mesh.rank}: parameters", built, count(planned))
    found.parameters.setdefault(role.name, Counter())[stage] = built
    _name_tensors(role, chunks, mesh, found)
    if not role.learns:
        return chunks
    overlap = config.parallel.overlap
    state = TrainState(chunks, OptimizerConfig(), total_steps=1, overlap=overlap)
    parts = [b for c in state.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    elements = sum(part.grad_data.numel() for part in parts)
    laid_out = buffers(learning(planned), work.layout, stage=stage)
    _compare(found, f"{role.name}, rank {mesh.rank}: buckets", elements, laid_out.num_elements)
    found.buckets.setdefault(role.name, Counter())[stage] = elements
    found.checkpoint_bytes[role.name] += bytes_to_write(state, mesh)
    return chunks


def _name_tensors(role: Role, chunks: Sequence[StageModel], mesh: Mesh, found: _Found) -> None:
    """Look every parameter up in the table of Hugging Face tensors, as an export does."""
    layout = layout_of(mesh, role.model)
    shards = find_shards(local_parameters(chunks), table_of(chunks), layout)
    if role.name == "policy":
        pieces = (piece for _, shard in shards for piece in shard.pieces)
        found.tensors |= {piece.name for piece in pieces if piece.name is not None}


def _build_rollout(work: Workload, mesh: Mesh, found: _Found) -> None:
    """Build the generator of a training rank, at the rollout's layout."""
    parallel, second = work.config.rollout_parallel, mesh
    if parallel != work.config.parallel:
        second = replace(create_second_mesh(parallel, mesh), platform=mesh.platform)
    with use_mesh(second):
        _build_generator(work, second, found)


def _build_rollout_ranks(work: Workload, config: Config, found: _Found) -> None:
    """Build the ranks that only generate, which have a mesh of their own."""
    layout = Generation.of_rollout(work).layout
    for rank in _distinct_ranks(layout, found):
        with fake_mesh(config.rollout_parallel, rank=rank, world_size=layout.world) as mesh:
            found.layouts.add(f"{mesh.describe()} that only generate")
            if config.rollout.engine == "own":
                transformer_config(config.model, config.precision, mesh, MemoryConfig())
            _build_generator(work, mesh, found)


def _build_generator(work: Workload, mesh: Mesh, found: _Found) -> None:
    """Build the policy at the layout of generation, and its KV cache; of an engine, neither."""
    config, generation = work.config, Generation.of_rollout(work)
    element = compute_dtype(config.precision, mesh).itemsize
    formats = Formats(element=element, has_engine=False, fp8=False)
    if generation.by_engine:  # it is not started for this
        found.kv_cache_bytes = kv_cache_bytes(work, generation, formats)
        return
    chunks = build_chunks(work.policy.model, config.precision, mesh, head="language")
    planned = stage_parameters(
        work.policy.model, generation.layout, head="language", stage=mesh.pp_rank
    )
    built = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    _compare(found, f"rollout, rank {mesh.rank}: parameters", built, count(planned))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    caches = [
        ChunkDecoder(chunk, num_slots=generation.group_slots, max_tokens=longest).cache
        for _ in range(generation.groups)
        for chunk in chunks
    ]
    held = sum(cache.nbytes for cache in caches)
    what = f"rollout, rank {mesh.rank}: bytes of kv cache"
    _compare(found, what, held, kv_cache_bytes(work, generation, formats))
    if work.num_rollout_ranks:
        found.parameters.setdefault("rollout", Counter())[mesh.pp_rank] = built
    found.kv_cache_bytes = held


def _compare(found: _Found, what: str, built: int, planned: int) -> None:
    if built != planned:
        found.problems.append(f"{what}: built {built:,}, planned {planned:,}")


def _report(work: Workload, found: _Found, seconds: float) -> list[str]:
    layout, learns = work.layout, [role.name for role in work.roles if role.learns]
    layouts = sorted(found.layouts, key=lambda text: text.endswith("only generate"))
    lines = [
        f"dry run: {work.job} on {' and '.join(layouts)}; "
        f"{found.num_ranks} distinct ranks built in {seconds:.1f} s",
    ]
    for name, sizes in found.parameters.items():
        shown = ", ".join(f"{sizes[stage]:,}" for stage in sorted(sizes))
        lines.append(f"{name}: parameters of a rank by stage {shown}")
    for name in learns:
        shown = ", ".join(f"{found.buckets[name][stage]:,}" for stage in range(layout.pipeline))
        lines.append(f"{name}: elements in its data-parallel buckets by stage {shown}")
    if found.kv_cache_bytes:
        lines.append(f"rollout: bytes of kv cache of a rank {found.kv_cache_bytes:,}")
    flying = [
        in_flight(layout, stage=stage, num_microbatches=work.num_microbatches)
        for stage in range(layout.pipeline)
    ]
    lines.append(
        f"schedule: {work.num_microbatches} microbatches of {work.microbatch.describe()} "
        f"tokens an optimizer step; in flight by stage "
        f"{', '.join(map(str, flying))}; idle {bubble(layout, work.num_microbatches):.0%}"
    )
    total = sum(found.checkpoint_bytes.values())
    lines.append(
        f"checkpoint: {total / GIB:.1f} GiB of {', '.join(learns)} in {layout.world} files a model"
    )
    if found.tensors:
        lines.append(f"export: {len(found.tensors)} Hugging Face tensors")
    return lines
