"""Generation: its layout, sequences at a time, and memory besides weights."""

from dataclasses import dataclass, replace

from marlhf_mega.config.limits import (
    GIB,
    PREFILL_TOKENS,
    engine_candidates,
    expert_bytes,
    paged_cache_bytes,
    replay_mask_row_bytes,
    round_up,
)
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.activations import (
    Formats,
    forward_workspace,
    head_workspace,
    layer_shape,
)
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.workload import MicrobatchShape, Workload


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Layout and batch of generation."""

    layout: WorldLayout
    slots: int
    """Sequences that one replica decodes together."""
    by_engine: bool = False
    """Whether vLLM generates, not our decoder."""

    @staticmethod
    def of_rollout(work: Workload) -> "Generation":
        """Return how the samples of a step are generated."""
        config = work.config
        layout = WorldLayout.of(
            config.rollout_parallel, work.num_rollout_ranks or work.layout.world
        )
        share = -(-config.rollout.batch_size // layout.data)
        return Generation(
            layout=layout,
            slots=min(config.rollout.slots or share, share),
            by_engine=config.rollout.engine == "vllm",
        )

    @staticmethod
    def of_evaluation(work: Workload) -> "Generation":
        """Return how ranks that train evaluate while other ranks only generate."""
        settings, parallel = work.config.evaluate, work.config.parallel.generating
        layout = WorldLayout.of(parallel, work.layout.world)
        share = -(-settings.num_prompts * settings.samples_per_prompt // layout.data)
        slots = max(1, settings.batch_size // layout.data)
        return Generation(layout=layout, slots=min(slots, share))

    @property
    def groups(self) -> int:
        """Groups of slots: as many as stages, so that each stage works on one."""
        return max(1, min(self.layout.pipeline, self.slots))

    @property
    def group_slots(self) -> int:
        """Slots of a group."""
        return max(1, -(-self.slots // self.groups))


def kv_cache_bytes(work: Workload, generation: Generation, formats: Formats) -> int:
    """Return the bytes of the key-value cache on every rank that generates."""
    model = work.policy.model
    if generation.by_engine:
        layout = generation.layout
        return engine_cache_bytes(
            work.config, tensor=layout.tensor, data=layout.data, element=formats.element
        )
    multiple = work.config.precision.fp8_alignment * generation.layout.sequence_share
    slots = generation.groups * round_up(generation.group_slots, multiple)
    longest = work.config.data.max_prompt_tokens + work.config.rollout.max_response_tokens
    heads = max(1, model.query_groups // generation.layout.tensor)
    width = heads * round_up(longest, multiple) * model.kv_channels
    layers = model.num_layers // generation.layout.pipeline
    return work.num_generating * layers * 2 * slots * width * formats.element


def engine_cache_bytes(config: Config, *, tensor: int, data: int, element: int) -> int:
    """Return the bytes of a vLLM engine's key-value cache on every rank.

    Args:
        config: of the run, whose vocabulary need not be known.
        tensor: ranks of a replica of the engine.
        data: its replicas.
        element: bytes of a number.
    """
    settings, model = config.rollout, config.model
    if settings.vllm.kv_cache_gib is not None:
        return int(settings.vllm.kv_cache_gib * GIB)
    return paged_cache_bytes(
        layers=model.num_layers,
        width=max(1, model.query_groups // tensor) * model.kv_channels,
        slots=engine_slots(config, data=data),
        tokens=config.data.max_prompt_tokens + settings.max_response_tokens,
        element=element,
    )


def engine_slots(config: Config, *, data: int) -> int:
    """Return the sequences that a replica of a vLLM engine decodes together at most."""
    share = -(-config.rollout.batch_size // data)
    return min(config.rollout.slots or share, share)


def replay_mask_bytes(work: Workload) -> int:
    """Return the host memory of a training rank for what top-k and top-p kept; 0 without them."""
    settings, vocab_size = work.config.rollout, work.policy.model.vocab_size or 0
    if work.job != "ppo" or not settings.is_filtered:
        return 0
    row = replay_mask_row_bytes(top_k=settings.top_k, vocab_size=vocab_size)
    if settings.engine == "vllm":
        row = 4 * engine_candidates(settings.top_k)
    return _kept_samples(work) * settings.max_response_tokens * row


def routing_bytes(work: Workload) -> int:
    """Return the host memory of a training rank for the experts that tokens went to; 0 without."""
    if not _records_routing(work):
        return 0
    model = work.policy.model
    tokens = work.config.data.max_prompt_tokens + work.config.rollout.max_response_tokens
    return _kept_samples(work) * tokens * model.num_layers * _routing_row(work)


def _records_routing(work: Workload) -> bool:
    return work.job == "ppo" and work.config.replays_routing


def _routing_row(work: Workload) -> int:
    """Return the bytes of a token's experts in one layer."""
    model = work.policy.model
    return model.experts_per_token * expert_bytes(model.num_experts or 0)


def _kept_samples(work: Workload) -> int:
    """Return the samples of which a training rank keeps records.

    With `rollout.staleness` the next step's wait beside those that are trained on.
    """
    settings = work.config.rollout
    # Ranks get the whole batch of ranks that only generate, or to filter it, and keep their share.
    whole = settings.ranks or settings.filter is not None
    waiting = settings.batch_size if whole else 0
    return work.batch_sequences + waiting * (1 + settings.staleness)


def generation_memory(
    work: Workload, generation: Generation, formats: Formats, *, for_training: bool = True
) -> dict[str, int]:
    """Return the memory of generation on a rank besides the weights.

    Args:
        work: the job.
        generation: its layout and batch.
        formats: number formats.
        for_training: whether samples are trained on, so that routing may be recorded.
    """
    prompt, longest = work.config.data.max_prompt_tokens, work.config.rollout.max_response_tokens
    prompts = max(1, min(generation.group_slots, PREFILL_TOKENS // prompt))
    shape = layer_shape(
        work.policy,
        replace(generation.layout, sequence_parallel=False),
        MicrobatchShape(sequences=prompts, seq=prompt, response=1),
        replace(formats, has_engine=False),
    )
    records = {}
    if for_training and _records_routing(work):
        tokens = generation.groups * generation.group_slots * (prompt + longest)
        layers = work.policy.model.num_layers // generation.layout.pipeline
        records["routing"] = tokens * layers * _routing_row(work)
    return records | {
        "kv cache": kv_cache_bytes(work, generation, formats),
        "prefill and sampling": max(
            forward_workspace(shape), sampling_bytes(work, generation, formats)
        ),
    }


def sampling_bytes(work: Workload, generation: Generation, formats: Formats) -> int:
    """Return the bytes that the logits of a step, their weights and sums need on a rank."""
    shape = layer_shape(
        work.policy,
        replace(generation.layout, sequence_parallel=False),
        MicrobatchShape(sequences=generation.group_slots, seq=1, response=1),
        replace(formats, has_engine=False),
    )
    return 2 * work.num_generating * head_workspace(shape, "language", backward=False)
