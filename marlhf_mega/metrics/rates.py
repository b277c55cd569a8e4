"""Throughput of each phase of a step: tokens per second, model FLOP/s, model FLOPs utilisation.

A phase counts every prompt and response token once, however many models read it. A rollout
counts the sampled tokens only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.flops import forward_flops, peak_flops, training_flops
from marlhf_mega.metrics.reduce import MetricSums


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """What one replica does in a phase."""

    tokens: float
    flops: float


def training_work(
    model: ModelConfig, prompts: Sequence[int], responses: Sequence[int], *, output_size: int
) -> PhaseWork:
    """Return the work of forward and backward, with the head on the response tokens.

    Args:
        model: the architecture.
        prompts: number of tokens of each prompt.
        responses: number of tokens of each response.
        output_size: columns of the head: the vocabulary size, or 1 for a scalar head.
    """
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    forward = forward_flops(model, whole, output_size=output_size, output_tokens=sum(responses))
    return PhaseWork(tokens=sum(whole), flops=training_flops(model, forward))


def ppo_work(
    config: Config,
    prompts: Sequence[int],
    responses: Sequence[int],
    *,
    generated: tuple[Sequence[int], Sequence[int]] | None = None,
) -> dict[str, PhaseWork]:
    """Return the work of one PPO step by phase.

    Args:
        config: of the run; all models count as having the policy's shape.
        prompts: tokens of every prompt of one replica.
        responses: tokens of every response.
        generated: the same before a filter, which scores them in the rollout; None without one.
    """
    model, epochs = config.model, config.ppo.epochs
    num_language = config.has_reference + (config.ppo.old_logprobs == "trainer")
    has_critic = config.ppo.has_critic
    reward = config.reward
    judges = reward.models if generated is None else reward.dense
    # A question with two answers is two sequences.
    num_language += sum(judge.is_language + (judge.answers is not None) for judge in judges)
    num_scalar = has_critic + sum(not judge.is_language for judge in judges)
    vocab, new = model.vocab_size or 0, sum(responses)
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    # The last token of a response is sampled and never fed back.
    sampled = generated or (prompts, responses)
    fed, drawn = [p + r - 1 for p, r in zip(*sampled, strict=True)], sum(sampled[1])
    rollout = forward_flops(model, fed, output_size=vocab, output_tokens=drawn)
    if config.rollout.mask_interval is not None:
        rollout *= 2
    language = forward_flops(model, whole, output_size=vocab, output_tokens=new)
    scalar = forward_flops(model, whole, output_size=1, output_tokens=new)
    tokens = sum(whole)
    work = {
        "rollout": PhaseWork(tokens=drawn, flops=rollout),
        "experience": PhaseWork(tokens=tokens, flops=num_language * language + num_scalar * scalar),
        "policy": PhaseWork(tokens=epochs * tokens, flops=epochs * training_flops(model, language)),
    }
    if has_critic:
        training = epochs * training_flops(model, scalar)
        work["critic"] = PhaseWork(tokens=epochs * tokens, flops=training)
    return work


def declared(phases: Sequence[str]) -> list[str]:
    """Return the names of the totals that `add` writes, for `MetricSums`."""
    return [f"{phase}/{what}" for phase in phases for what in ("work_tokens", "work_flops")]


def add(sums: MetricSums, work: Mapping[str, PhaseWork]) -> None:
    """Add the work of one replica; call it on one of its ranks."""
    for phase, done in work.items():
        sums.add_total(f"{phase}/work_tokens", float(done.tokens))
        sums.add_total(f"{phase}/work_flops", done.flops)


def rates(
    metrics: dict[str, float],
    seconds: Mapping[str, float],
    *,
    num_devices: int,
    device_name: str,
) -> dict[str, float]:
    """Remove the totals of the given phases from `metrics` and return their rates.

    Args:
        metrics: reduced over all ranks.
        seconds: phase -> duration; a phase that did not run has no rates.
        num_devices: number of devices that took part.
        device_name: decides the peak; without a known peak there is no MFU.

    Returns:
        `perf/tokens_per_second_P`, `perf/tflops_P` (10^12 model FLOP/s per device) and
        `perf/mfu_P` of every phase P.
    """
    found = {}
    peak = peak_flops(device_name)
    for phase, duration in seconds.items():
        tokens, flops = (metrics.pop(name) for name in declared([phase]))
        if duration <= 0:
            continue
        found[f"perf/tokens_per_second_{phase}"] = tokens / duration
        found[f"perf/tflops_{phase}"] = flops / duration / num_devices / 1e12
        if peak is not None:
            found[f"perf/mfu_{phase}"] = flops / (duration * num_devices * peak)
    return found
