"""Generation: who generates, how many sequences at a time, and what that holds beside weights."""

from dataclasses import dataclass, replace

from marlhf_mega.config.limits import PREFILL_TOKENS
from marlhf_mega.plan.activations import (
    Formats,
    forward_workspace,
    head_workspace,
    layer_shape,
)
from marlhf_mega.plan.layout import Layout, round_up
from marlhf_mega.plan.workload import Microbatch, Workload


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How the replicas of a layout generate."""

    layout: Layout
    slots: int
    """Sequences that one replica decodes together."""

    @staticmethod
    def of_rollout(work: Workload) -> "Generation":
        """Return where the samples of a step come from."""
        config = work.config
        layout = Layout.of(config.rollout_parallel, work.num_rollout_ranks or work.layout.world)
        rows = -(-config.rollout.batch_size // layout.data)
        return Generation(layout=layout, slots=min(config.rollout.slots or rows, rows))

    @staticmethod
    def of_evaluation(work: Workload) -> "Generation":
        """Return how ranks that train answer held-out prompts while others only generate."""
        settings, parallel = work.config.evaluate, work.config.parallel.generating
        layout = Layout.of(parallel, work.layout.world)
        rows = -(-settings.num_prompts // layout.data)
        slots = max(1, settings.batch_size // layout.data)
        return Generation(layout=layout, slots=min(slots, rows))

    @property
    def groups(self) -> int:
        """Groups of slots: as many as stages, which they go through one after the other."""
        return max(1, min(self.layout.pipeline, self.slots))

    @property
    def group_slots(self) -> int:
        """Slots of a group."""
        return max(1, -(-self.slots // self.groups))


def kv_cache_bytes(work: Workload, generation: Generation, formats: Formats) -> int:
    """Return the bytes of keys and values on every rank that generates."""
    model = work.policy.model
    multiple = work.config.precision.fp8_alignment * generation.layout.sequence_share
    slots = generation.groups * round_up(generation.group_slots, multiple)
    longest = work.config.data.max_prompt_tokens + work.config.rollout.max_response_tokens
    heads = max(1, model.query_groups // generation.layout.tensor)
    width = heads * round_up(longest, multiple) * model.kv_channels
    layers = model.num_layers // generation.layout.pipeline
    return layers * 2 * slots * width * formats.element


def generation_memory(work: Workload, generation: Generation, formats: Formats) -> dict[str, int]:
    """Return what generating holds on a rank beside the weights."""
    prompt = work.config.data.max_prompt_tokens
    rows = max(1, min(generation.group_slots, PREFILL_TOKENS // prompt))
    shape = layer_shape(
        work.policy,
        replace(generation.layout, sequence_parallel=False),
        Microbatch(rows=rows, seq=prompt, response=1),
        replace(formats, has_engine=False),
    )
    decode = Microbatch(rows=generation.group_slots, seq=1, response=1)
    logits = head_workspace(replace(shape, microbatch=decode), "language", backward=False) * 2
    return {
        "kv cache": kv_cache_bytes(work, generation, formats),
        "prefill and sampling": max(forward_workspace(shape), logits),
    }
