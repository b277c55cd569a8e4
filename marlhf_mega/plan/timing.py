"""Time of a step, estimated from shapes and stated efficiencies; not measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.flops import forward_flops, training_flops
from marlhf_mega.plan.activations import Formats
from marlhf_mega.plan.buffers import buffers
from marlhf_mega.plan.generation import Generation, kv_cache_bytes
from marlhf_mega.plan.gpus import Gpu
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.memory import role_memory
from marlhf_mega.plan.parameters import largest_stage, learning, stage_parameters
from marlhf_mega.plan.workload import GENERATING_ROLES, Role, Workload

GENERATION_PARTS = ("rollout prefill", "rollout decode")
"""Parts of a step that ranks which only generate do, if there are any."""
MOVE = "rollout move"
"""The part of a step that reshards weights for generation."""


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """Shares of the data sheets' numbers that a run reaches. All are assumptions."""

    training_flops: float = 0.40
    """Of the bfloat16 peak in training; Megatron-Core publishes 0.41 to 0.49 on H100."""
    forward_flops: float = 0.45
    """Of the bfloat16 peak in prefill and scoring."""
    fp8_speedup: float = 1.4
    """Speed-up of these passes by FP8."""
    memory_bandwidth: float = 0.6
    """Of the memory bandwidth, while decoding."""
    decode_layer_seconds: float = 3e-4
    """Least time of one layer in a decode step: kernel launches and two small all-reduces."""
    network_bytes: float = 40e9
    """Bytes per second per GPU between machines, one way."""
    host_bytes: float = 20e9
    """Bytes per second between each GPU and host memory, with all GPUs at once."""


def step_seconds(
    work: Workload, gpu: Gpu, formats: Formats, rates: Efficiencies
) -> dict[str, float]:
    """Return the seconds of every part of a step, for sequences of the greatest length."""
    found: dict[str, float] = {}
    # A filter leaves so much of what is generated and rewarded.
    rollout, kept = work.config.rollout, 1.0
    # The baseline of remax is a second, greedy response to each prompt.
    answers = 2 if work.config.ppo.estimator == "remax" else 1
    if work.job == "ppo":
        kept = rollout.trained_size / rollout.batch_size
        times = answers * work.num_generating
        found["rollout prefill"] = times * _prefill(work, gpu, rates)
        found["rollout decode"] = times * _decode(work, gpu, formats, rates)
        if work.config.ppo.estimator == "vine":
            found["experience continuations"] = kept * _continuations(work.config, found)
            number = kept * _num_continuations(work.config)
            found["experience their scores"] = number * _scores(work, gpu, rates)
        if work.config.reward.compares_references:
            # One to each prompt; if there are more, so many times as long.
            found["experience scores of references"] = _scores(work, gpu, rates)
        if work.num_rollout_ranks or work.config.moves_weights:
            found[MOVE] = _move(work, gpu, formats, rates)
        offload = _offload(work, formats, rates)
        if offload:
            found["offload"] = offload
        again = work.config.ppo.old_logprobs == "trainer"
        asked = [r for r in work.roles if r.name != "mask"]
        for role in (r for r in asked if again or r.name != "policy"):
            share = answers if _judges(role) else kept
            found[f"experience {role.name}"] = share * _forward(work, role, gpu, rates)
    if work.job == "reward":
        found |= _passes_over_pairs(work, gpu, rates)
    epochs = kept * (work.config.ppo.epochs if work.job == "ppo" else 1)
    for role in (r for r in work.roles if r.learns):
        found[f"update {role.name}"] = epochs * _train(work, role, gpu, rates)
        found[f"gradients {role.name}"] = epochs * _reduce(work, role, gpu, formats, rates)
    return found


def besides_steps(
    work: Workload, seconds: Mapping[str, float], gpu: Gpu, rates: Efficiencies
) -> dict[str, float]:
    """Return the seconds of what does not happen in every step, or not as often.

    Args:
        work: the job.
        seconds: of the parts of a step.
        gpu: the device.
        rates: what it reaches.

    Returns:
        `another try`: of a step of ppo that generates all its samples once more, as
        `rollout.filter=dynamic` does at most; `reference`: of preference, for the pairs of a step,
        all of which are passed before the first one.
    """
    config, found = work.config, dict[str, float]()
    if work.job == "ppo" and config.rollout.filter == "dynamic" and config.rollout.filter_tries > 1:
        generated = sum(seconds[part] for part in GENERATION_PARTS)
        found["another try"] = generated + _scores(work, gpu, rates)
    if work.job == "preference" and config.preference.needs_reference:
        found["reference"] = _forward(work, work.policy, gpu, rates, learns=False)
    return found


def whole_step(work: Workload, seconds: Mapping[str, float]) -> float:
    """Return the time of a step: the sum of its parts, unless generation and training overlap."""
    generating = sum(seconds.get(part, 0.0) for part in GENERATION_PARTS)
    training = training_seconds(seconds)
    if work.num_rollout_ranks and work.config.rollout.staleness:
        return max(generating, training) + seconds[MOVE]
    return sum(seconds.values())


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the time of experience and update."""
    return sum(size for part, size in seconds.items() if part not in (*GENERATION_PARTS, MOVE))


def _continuations(config: Config, rollout: Mapping[str, float]) -> float:
    """Time of generating on from every macro action, after half of a response on average."""
    longest = config.rollout.max_response_tokens
    number = _num_continuations(config)
    prefill = (1 + longest / config.data.max_prompt_tokens / 2) * rollout["rollout prefill"]
    return number * (prefill + rollout["rollout decode"] / 2)


def _num_continuations(config: Config) -> int:
    """Return how many continuations a response has.

    Where the content decides where actions end, they are taken to have `macro.n` tokens.
    """
    longest = config.rollout.max_response_tokens
    lengths = {"token": 1, "whole_response": longest}
    return config.ppo.vine_samples * -(-longest // lengths.get(config.macro.rule, config.macro.n))


def _judges(role: Role) -> bool:
    return role.name.startswith("reward") and not role.learns


def _scores(work: Workload, gpu: Gpu, rates: Efficiencies) -> float:
    """Time in which all reward models score as many whole responses as a step has."""
    return sum(_forward(work, role, gpu, rates) for role in work.roles if _judges(role))


def _passes_over_pairs(work: Workload, gpu: Gpu, rates: Efficiencies) -> dict[str, float]:
    """Time of what the training of a reward model passes without a backward pass in every step."""
    settings, found = work.config.reward_model, {}
    once = _forward(work, work.policy, gpu, rates)
    if settings.length_coef:
        found["experience lengths"] = once
    if settings.latent_size:
        # No two pairs of a batch share a context, at worst.
        found["experience contexts"] = settings.latent_context * once
    return found


def _offload(work: Workload, formats: Formats, rates: Efficiencies) -> float:
    """Time of offloading: frozen models are only loaded, the critic comes and goes twice."""
    memory, precision, moved = work.config.memory, work.config.precision, []
    for stage in range(work.layout.pipeline):
        found = 0
        for role in work.roles:
            held = role_memory(role, work.layout, stage, formats, precision)
            if memory.offload_idle and role.name not in GENERATING_ROLES:
                found += held.weights * (4 if role.learns else 1)
            if memory.offload_optimizer:
                found += 2 * held.optimizer
        moved.append(found)
    return max(moved) / rates.host_bytes


def bubble(layout: WorldLayout, num_microbatches: int) -> float:
    """Return the idle time of a pipeline relative to its work (Narayanan et al. 2021)."""
    return (layout.pipeline - 1) / (num_microbatches * layout.chunks)


def _forward(
    work: Workload, role: Role, gpu: Gpu, rates: Efficiencies, *, learns: bool | None = None
) -> float:
    """Time of scoring a step's sequences; `learns`: in whose precision, default: the role's."""
    flops = _flops(work, role, seq=work.microbatch.seq, outputs=work.microbatch.response)
    learns = role.learns if learns is None else learns
    speed = gpu.flops * rates.forward_flops * _speedup(work, rates, learns=learns)
    count = -(-work.batch_sequences // work.scoring.sequences)
    return flops / (speed * work.layout.world) * (1 + bubble(work.layout, count))


def _prefill(work: Workload, gpu: Gpu, rates: Efficiencies) -> float:
    layout = Generation.of_rollout(work).layout
    flops = _flops(work, work.policy, seq=work.config.data.max_prompt_tokens, outputs=1)
    speed = gpu.flops * rates.forward_flops * _speedup(work, rates, learns=True)
    share = -(-work.config.rollout.batch_size // layout.data)
    count = -(-share // work.microbatch.sequences)
    return flops / (speed * layout.world) * (1 + bubble(layout, count))


def _move(work: Workload, gpu: Gpu, formats: Formats, rates: Efficiencies) -> float:
    """Time of resharding: a rank receives all that learns; training ranks send equal shares."""
    layout = Generation.of_rollout(work).layout
    trained = largest_stage(work.policy.model, layout, "language", only_learning=True)
    into = trained * formats.element
    out = into * layout.world / work.layout.world
    speed = gpu.link if work.world_size <= 8 else min(gpu.link, rates.network_bytes)
    return max(into, out) / speed


def _train(work: Workload, role: Role, gpu: Gpu, rates: Efficiencies) -> float:
    forward = _flops(work, role, seq=work.microbatch.seq, outputs=work.microbatch.response)
    again = forward if work.config.memory.recompute == "full" else 0.0
    speed = gpu.flops * rates.training_flops * _speedup(work, rates, learns=True)
    idle = 1 + bubble(work.layout, work.num_microbatches)
    return (training_flops(role.model, forward) + again) / (speed * work.layout.world) * idle


def _flops(work: Workload, role: Role, *, seq: int, outputs: int) -> float:
    count = work.batch_sequences * work.layout.data
    size = (role.model.vocab_size or 0) if role.head == "language" else 1
    return forward_flops(role.model, [seq] * count, output_size=size, output_tokens=outputs * count)


def _decode(work: Workload, gpu: Gpu, formats: Formats, rates: Efficiencies) -> float:
    """Each token of a group of slots reads the stage's weights and its cache, for one model."""
    generation, policy = Generation.of_rollout(work), work.policy
    layout = generation.layout
    weights = largest_stage(policy.model, layout, "language") * formats.element
    # The cache is half full on average.
    caches = generation.groups * work.num_generating
    cache = kv_cache_bytes(work, generation, formats) / caches / 2
    speed = gpu.bandwidth * rates.memory_bandwidth
    layers = policy.model.num_layers // layout.pipeline
    one = max((weights + cache) / speed, layers * rates.decode_layer_seconds)
    waves = -(-work.config.rollout.batch_size // layout.data) / generation.slots
    return one * layout.pipeline * work.config.rollout.max_response_tokens * waves


def _reduce(work: Workload, role: Role, gpu: Gpu, formats: Formats, rates: Efficiencies) -> float:
    """Time to reduce gradients and gather weights, once per optimizer step.

    With overlap, the backward pass of one microbatch (two thirds of its time) hides gradients,
    except for the first stage's largest bucket, usually that of the embeddings; and in ppo the
    passes of the other trained model hide the gathering of weights.
    """
    layout = work.layout
    replicas = layout.data * layout.context
    if replicas == 1:
        return 0.0
    largest = largest_stage(role.model, layout, role.head, only_learning=True)
    within = layout.tensor * replicas <= 8 and layout.pipeline == 1
    speed = gpu.link if within else min(gpu.link, rates.network_bytes)
    element_seconds = (replicas - 1) / replicas / speed
    gradients, weights = (largest * size * element_seconds for size in (4, formats.element))
    steps = work.batch_sequences / work.minibatch_sequences
    if layout.overlap:
        first = stage_parameters(role.model, layout, head=role.head, stage=0)
        bucket = max(buffers(learning(first), layout, stage=0).buckets) * 4 * element_seconds
        backward = 2 / 3 * _train(work, role, gpu, rates) / steps / work.num_microbatches
        gradients = max(min(bucket, gradients), gradients - backward)
        others = [r for r in work.roles if r.learns and r is not role]
        weights = max(0.0, weights - sum(_train(work, r, gpu, rates) for r in others) / steps)
    return steps * (gradients + weights)


def _speedup(work: Workload, rates: Efficiencies, *, learns: bool) -> float:
    precision = work.config.precision
    in_fp8 = precision.fp8 != "off" and (learns or precision.fp8_frozen)
    return rates.fp8_speedup if in_fp8 else 1.0
