"""The numbers of a PPO step, from tensors to metrics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.metrics import rates
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PhaseTimers

EXPERIENCE_MEANS = (
    "rollout/response_tokens",
    "rollout/truncated_fraction",
    "rollout/invalid_fraction",
    "rollout/violation_fraction",
    "rollout/dense_reward",
    "rollout/logprob_gap",
    "rollout/masked_fraction",
    "rollout/kept_probability",
    "rollout/continuation_tokens",
    "policy/kl",
    "policy/entropy",
    "macro/actions_per_response",
    "macro/tokens_per_action",
    "macro/fallback_fraction",
)
EXPERIENCE_MOMENTS = ("rollout/score", "critic/return", "critic/error", "policy/advantage")
EXPERIENCE_MAXIMA = ("rollout/logprob_gap_max",)
UPDATE_MEANS = (
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/ratio",
    "policy/routing_differs",
    "policy/kl_loss",
    "policy/entropy_loss",
    "policy/grad_norm",
    "policy/lr",
    "policy/skipped_fraction",
    "critic/loss",
    "critic/clip_fraction",
    "critic/value",
    "critic/grad_norm",
    "critic/lr",
    "critic/skipped_fraction",
)


RATED_PHASES = ("rollout", "experience", "policy", "critic")
"""What tokens per second, FLOP/s and MFU are of."""


def step_sums(*, maximum: Sequence[str] = ()) -> MetricSums:
    """Declare the metrics of one PPO step, with further maxima."""
    return MetricSums(
        mean=[*EXPERIENCE_MEANS, *UPDATE_MEANS],
        moments=EXPERIENCE_MOMENTS,
        total=rates.declared(RATED_PHASES),
        maximum=[*EXPERIENCE_MAXIMA, *maximum],
    )


def add_rollout(
    sums: MetricSums, *, scores: Tensor, response_lengths: Sequence[int], finished: Sequence[bool]
) -> None:
    """Add one replica's responses.

    Args:
        sums: of the step.
        scores: [batch] raw scores, NaN where there is none.
        response_lengths: tokens of every response.
        finished: whether each response ended by itself.
    """
    sums.add_moments("rollout/score", scores[~scores.isnan()])
    sums.add_mean("rollout/response_tokens", torch.tensor(response_lengths, dtype=torch.float32))
    sums.add_mean("rollout/truncated_fraction", ~torch.tensor(finished))
    sums.add_mean("rollout/invalid_fraction", scores.isnan())


def add_dense(sums: MetricSums, *, rewards: Tensor, mask: Tensor) -> None:
    """Add one replica's dense rewards, [batch, response], where there are any."""
    total = (rewards * mask).sum(1)[mask.any(1)]
    sums.add_mean("rollout/dense_reward", total)


def add_violations(sums: MetricSums, *, holds: Tensor, valid: Tensor) -> None:
    """Add one replica's [batch] answers of the judges, where there are any."""
    sums.add_mean("rollout/violation_fraction", ~holds[valid])


def add_logprobs(
    sums: MetricSums,
    *,
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    full_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
) -> None:
    """Add one replica's log-probs, all [batch, response].

    Args:
        sums: of the step.
        logprobs: of the policy at rollout.
        sampled_logprobs: the same by the sampler.
        full_logprobs: of the policy at rollout, before the sampler's filters.
        ref_logprobs: of the reference; None without one.
        entropy: of the policy; None where the trainer has not computed log-probs.
        mask: True on the tokens that count.
    """
    tokens = mask.sum()
    if entropy is not None:
        gap = ((logprobs - sampled_logprobs) * mask).abs()
        sums.add_means(
            {"rollout/logprob_gap": gap.sum(), "policy/entropy": (entropy * mask).sum()},
            count=tokens,
        )
        sums.add_maximum("rollout/logprob_gap_max", gap.max())
    if ref_logprobs is not None:
        divergence = ((full_logprobs - ref_logprobs) * mask).sum(1)
        sums.add_means({"policy/kl": divergence.sum()}, count=mask.any(1).sum())


def add_macro_actions(
    sums: MetricSums, *, lengths: Tensor, mask: Tensor, num_fallbacks: int
) -> None:
    """Add one replica's macro actions.

    Args:
        sums: of the step.
        lengths: [batch, macro] tokens of every action.
        mask: [batch, response], True on the tokens that count.
        num_fallbacks: responses that could not be parsed.
    """
    num_actions = (lengths > 0).sum()
    sums.add_means({"macro/actions_per_response": num_actions}, count=mask.any(1).sum())
    sums.add_means({"macro/tokens_per_action": mask.sum()}, count=num_actions)
    sums.add_means({"macro/fallback_fraction": float(num_fallbacks)}, count=len(mask))


def add_values(sums: MetricSums, *, values: Tensor, returns: Tensor, mask: Tensor) -> None:
    """Add the critic's values at rollout and their targets, all [batch, response]."""
    error = (returns - values) * mask
    sums.add_moments("critic/return", returns * mask, count=mask.sum())
    sums.add_moments("critic/error", error, count=mask.sum())


def add_advantages(sums: MetricSums, *, advantages: Tensor, mask: Tensor) -> None:
    """Add one replica's advantages before whitening, [batch, response]."""
    sums.add_moments("policy/advantage", advantages * mask, count=mask.sum())


def add_masked(sums: MetricSums, *, weights: Tensor, mask: Tensor) -> None:
    """Add which of the tokens that count weigh nothing, all [batch, response]."""
    sums.add_means({"rollout/masked_fraction": ((weights == 0) & mask).sum()}, count=mask.sum())


def add_kept(sums: MetricSums, *, logprobs: Tensor, full_logprobs: Tensor, mask: Tensor) -> None:
    """Add the sampler's log-probs after and before its filters, all [batch, response]."""
    kept = (full_logprobs - logprobs).exp() * mask
    sums.add_means({"rollout/kept_probability": kept.sum()}, count=mask.sum())


def finish(metrics: dict[str, float]) -> dict[str, float]:
    """Turn reduced variances into standard deviations and the explained variance."""
    for name in ("rollout/score", "policy/advantage"):
        variance = metrics.pop(f"{name}_variance", None)
        if variance is not None:
            metrics[f"{name}_std"] = variance**0.5
    metrics.pop("policy/advantage_mean", None)
    total = metrics.pop("critic/return_variance", 0.0)
    left = metrics.pop("critic/error_variance", 0.0)
    metrics.pop("critic/error_mean", None)
    if total > 0:
        metrics["critic/explained_variance"] = 1 - left / total
    return metrics


def step_rates(
    metrics: dict[str, float],
    phases: PhaseTimers,
    roles: PhaseTimers,
    *,
    generation_seconds: float,
    num_generating: int,
    num_training: int,
    device_name: str,
) -> dict[str, float]:
    """Turn work and seconds into tokens per second, FLOP/s and, where the peak is known, MFU.

    Args:
        metrics: reduced; the work is taken out of it.
        phases: seconds of rollout, experience and update.
        roles: seconds of policy and critic in the update.
        generation_seconds: of the rollout, on the ranks that generate.
        num_generating: ranks that generate.
        num_training: ranks that train.
        device_name: of a rank's device.
    """
    step_seconds = sum(map(phases.seconds, ("rollout", "experience", "update")))
    training_seconds = {
        "experience": phases.seconds("experience"),
        **{role: roles.seconds(role) for role in ("policy", "critic")},
    }
    found = {"perf/tokens_per_second": metrics["experience/work_tokens"] / step_seconds}
    for seconds, num_devices in (
        ({"rollout": generation_seconds}, num_generating),
        (training_seconds, num_training),
    ):
        found |= rates.rates(metrics, seconds, num_devices=num_devices, device_name=device_name)
    found["rollout/tokens_per_second"] = found.pop("perf/tokens_per_second_rollout")
    return found
