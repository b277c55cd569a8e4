"""Tokens per second, model FLOP/s and share of the devices' peak of every phase of a step.

A phase's tokens are prompt and response tokens it reads or writes once, whatever the number of
models that see them; of a rollout they are the sampled ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.metrics.flops import forward_flops, mfu, peak_flops, training_flops
from marlhf_mega.metrics.reduce import MetricSums


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one replica does in a phase."""

    tokens: float
    flops: float


def training_work(
    model: ModelConfig, prompts: Sequence[int], responses: Sequence[int], *, output_size: int
) -> Work:
    """Return the work of forward and backward with a head on the response tokens.

    Args:
        model: the architecture.
        prompts: tokens of every prompt.
        responses: tokens of every response.
        output_size: columns of the head: the vocabulary size, or 1 for a scalar head.
    """
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    forward = forward_flops(model, whole, output_size=output_size, output_tokens=sum(responses))
    return Work(tokens=sum(whole), flops=training_flops(forward))


def ppo_work(
    model: ModelConfig,
    prompts: Sequence[int],
    responses: Sequence[int],
    *,
    epochs: int,
    num_language: int,
    num_rewards: int,
) -> dict[str, Work]:
    """Return the work of one PPO step by phase.

    Args:
        model: the architecture of all models.
        prompts: tokens of every prompt.
        responses: tokens of every response.
        epochs: of the update.
        num_language: models whose log-probs the experience takes, the sampler's apart.
        num_rewards: learned reward models.
    """
    vocab, new = model.vocab_size or 0, sum(responses)
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    # The last token of a response is sampled and never fed back.
    rollout = forward_flops(model, [n - 1 for n in whole], output_size=vocab, output_tokens=new)
    language = forward_flops(model, whole, output_size=vocab, output_tokens=new)
    scalar = forward_flops(model, whole, output_size=1, output_tokens=new)
    tokens = sum(whole)
    return {
        "rollout": Work(tokens=new, flops=rollout),
        "experience": Work(
            tokens=tokens, flops=num_language * language + (1 + num_rewards) * scalar
        ),
        "policy": Work(tokens=epochs * tokens, flops=epochs * training_flops(language)),
        "critic": Work(tokens=epochs * tokens, flops=epochs * training_flops(scalar)),
    }


def declared(phases: Sequence[str]) -> list[str]:
    """Return the names of the totals that `add` writes, for `MetricSums`."""
    return [f"{phase}/{what}" for phase in phases for what in ("work_tokens", "work_flops")]


def add(sums: MetricSums, work: Mapping[str, Work]) -> None:
    """Add one replica's work; called on one rank of each."""
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
    """Take the totals of the named phases out of `metrics` and return their rates.

    Args:
        metrics: of all ranks; the totals of `declared` are removed.
        seconds: of every phase; a phase that did not run has no rates.
        num_devices: of the world.
        device_name: MFU is left out where its peak is not known.

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
        share = mfu(flops, seconds=duration, num_devices=num_devices, peak=peak)
        if share is not None:
            found[f"perf/mfu_{phase}"] = share
    return found
