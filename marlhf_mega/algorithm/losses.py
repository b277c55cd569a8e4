"""Losses of PPO with macro actions, of reward models and of supervised fine-tuning.

Every loss returns a sum and a count; the caller divides once by the count of the whole optimizer
step (all microbatches, all data-parallel ranks), so that the gradient does not depend on how the
batch is split. An aggregation is a set of token weights with the matching count. No loss
communicates. Token tensors must be finite on padding, whose weight is 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.algorithm.choices import (
    Aggregation,
    LossKl,
    MismatchUnit,
    Ratio,
    ValueTarget,
    check_choice,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.rewards import kl_estimate

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp, to prevent overflow."""


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss as a sum and a count."""

    loss_sum: Tensor
    """Scalar with gradient, to be divided by the global count."""
    count: Tensor
    """Scalar, number of terms of the sum: tokens, sequences, macro actions or pairs."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """(sum, count) scalars without gradient; the metric is their ratio after reduction."""


def token_weights(
    actions: MacroActions, aggregation: Aggregation, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights of token terms, and the count that turns their weighted sum into a mean.

    token_mean: mean over tokens. seq_mean_token_mean: mean over sequences of the mean over their
    tokens. seq_mean_token_sum: mean over sequences of sums. seq_sum_const: the same, which
    `over_budget` divides by a constant. macro_mean: mean over (non-empty) macro actions of the mean
    over their tokens.

    Returns:
        weights of the shape of actions.ids, 0 on padding; count, scalar of dtype.
    """
    check_choice("aggregation", aggregation, Aggregation)
    lengths = actions.lengths
    match aggregation:
        case "token_mean":
            return actions.response_mask.to(dtype), lengths.sum().to(dtype)
        case "macro_mean":
            return (
                actions.spread(lengths.to(dtype).clamp(min=1).reciprocal()),
                (lengths > 0).sum().to(dtype),
            )
    row_lengths = lengths.sum(1, keepdim=True)
    num_sequences = (row_lengths > 0).sum().to(dtype)
    if aggregation in ("seq_mean_token_sum", "seq_sum_const"):
        return actions.response_mask.to(dtype), num_sequences
    inverse = row_lengths.to(dtype).clamp(min=1).reciprocal()
    return actions.spread(inverse.expand_as(lengths)), num_sequences


def over_budget(loss: LossOutput, tokens: int) -> LossOutput:
    """Divide a sum over a sequence's tokens, and its metrics, by a budget instead of its length.

    Dr. GRPO (arXiv 2503.20783), section 3.2: a mean over the length would teach long wrong answers.

    Args:
        loss: with the aggregation seq_sum_const.
        tokens: the longest response that is generated.
    """
    metrics = {name: (total, count * tokens) for name, (total, count) in loss.metrics.items()}
    return LossOutput(loss_sum=loss.loss_sum, count=loss.count * tokens, metrics=metrics)


def log_ratios(
    logprobs: Tensor, old_logprobs: Tensor, actions: MacroActions, ratio: Ratio
) -> Tensor:
    """Log of the likelihood ratio new / old in each token's term.

    token: that of the token. macro: its sum over the token's macro action (the paper's ratio).
    macro_geo: its mean over the action (length-normalised, arXiv 2507.18071).
    """
    check_choice("ratio", ratio, Ratio)
    token_log_ratios = logprobs - old_logprobs
    if ratio == "token":
        return token_log_ratios
    pooled = actions.pool(token_log_ratios)
    if ratio == "macro_geo":
        pooled = pooled / actions.lengths.clamp(min=1)
    return actions.spread(pooled)


def sampler_weights(
    old_logprobs: Tensor,
    sampled_logprobs: Tensor,
    actions: MacroActions,
    *,
    ratio: Ratio,
    cap: float,
) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_sampler, cap), which scale the advantages.

    They correct for a sampler that differs from the trainer, in precision or by weights of an
    earlier step. Not clipped from below: a token that the trainer finds unlikely counts less.

    Args:
        old_logprobs: like actions.ids, of the policy at rollout, computed by the trainer.
        sampled_logprobs: like actions.ids, the same, computed by the sampler.
        actions: segmentation.
        ratio: per token or per macro action, as in the loss.
        cap: C, at least 1.
    """
    gaps = log_ratios(old_logprobs, sampled_logprobs, actions, ratio)
    return gaps.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def sampler_mask(
    old_logprobs: Tensor,
    sampled_logprobs: Tensor,
    actions: MacroActions,
    *,
    unit: MismatchUnit,
    bounds: tuple[float, float],
) -> Tensor:
    """Keep the units whose pi_trainer / pi_sampler is within bounds; the others teach nothing.

    Per token, and with `sampler_weights` beside it, this is IcePop (arXiv 2510.18855). Of a macro
    action or a sequence the ratio is the geometric mean per token, so that the bounds do not depend
    on its length.

    Args:
        old_logprobs: as in `sampler_weights`.
        sampled_logprobs: as in `sampler_weights`.
        actions: segmentation.
        unit: what is kept or left out together.
        bounds: lowest and highest ratio that is kept.

    Returns:
        Like actions.ids, bool; False on padding.
    """
    check_choice("unit", unit, MismatchUnit)
    gaps = log_ratios(
        old_logprobs, sampled_logprobs, actions, "token" if unit == "token" else "macro_geo"
    )
    if unit == "sequence":
        lengths = actions.lengths
        means = actions.pool(gaps).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp(min=1)
        gaps = actions.spread(means.expand_as(lengths))
    low, high = (math.log(bound) for bound in bounds)
    return actions.response_mask & (gaps >= low) & (gaps <= high)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: MacroActions,
    *,
    ratio: Ratio = "token",
    aggregation: Aggregation = "token_mean",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """Clipped surrogate -min(rho A, clip(rho, 1 - eps, 1 + high) A) (PPO, arXiv 1707.06347, eq. 7).

    A macro ratio gives every token of an action the action's term; with macro_mean that is one
    term per action.

    Args:
        logprobs: like actions.ids, of the policy being trained.
        old_logprobs: like actions.ids, of the policy at rollout.
        advantages: like actions.ids, constant inside actions, without gradient.
        actions: segmentation, padded or packed.
        ratio: see `log_ratios`.
        aggregation: see `token_weights`.
        clip_range: eps.
        clip_range_high: upper range, clip-higher of DAPO (arXiv 2503.14476); None means eps.
        dual_clip: bounds the loss by -c A where A < 0 (arXiv 1912.09729); None is off.
    """
    weights, count = token_weights(actions, aggregation, dtype=logprobs.dtype)
    log_ratio = log_ratios(logprobs, old_logprobs, actions, ratio)
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = rho * advantages
    high = clip_range if clip_range_high is None else clip_range_high
    gains = torch.minimum(unclipped, rho.clamp(1.0 - clip_range, 1.0 + high) * advantages)
    if dual_clip is not None:
        floor = torch.maximum(gains, dual_clip * advantages)
        gains = torch.where(advantages < 0, floor, gains)
    with torch.no_grad():
        metrics = {
            "clip_fraction": (((gains != unclipped) * weights).sum(), count),
            "approx_kl": (((rho - 1.0 - log_ratio) * weights).sum(), count),
            "ratio": ((rho * weights).sum(), count),
        }
    return LossOutput(loss_sum=-(gains * weights).sum(), count=count, metrics=metrics)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    actions: MacroActions,
    *,
    target: ValueTarget = "token",
    pool_weights: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    clip_range: float | None = 0.2,
) -> LossOutput:
    """Squared error to the return of the macro action: 0.5 max((v - G)^2, (clip(v) - G)^2).

    Args:
        values: like actions.ids, of the critic being trained.
        old_values: like actions.ids, at rollout.
        returns: like actions.ids, G_k of the token's action, without gradient.
        actions: segmentation, padded or packed.
        target: "token" regresses every token's value; "macro" pools the values of an action
            first, new and old, and every token of the action carries the action's term.
        pool_weights: like actions.ids, from `value_weights`; needed for "macro".
        aggregation: see `token_weights`.
        clip_range: new values are clipped to old +- this; None is off.
    """
    check_choice("target", target, ValueTarget)
    weights, count = token_weights(actions, aggregation, dtype=values.dtype)
    if target == "macro":
        assert pool_weights is not None
        values = actions.spread(actions.pool(values * pool_weights))
        old_values = actions.spread(actions.pool(old_values * pool_weights))
    unclipped = (values - returns).square()
    errors = unclipped
    if clip_range is not None:
        near = values.clamp(old_values - clip_range, old_values + clip_range)
        errors = torch.maximum(unclipped, (near - returns).square())
    with torch.no_grad():
        metrics = {
            "value": ((values * weights).sum(), count),
            "clip_fraction": (((errors != unclipped) * weights).sum(), count),
        }
    return LossOutput(loss_sum=0.5 * (errors * weights).sum(), count=count, metrics=metrics)


def entropy_loss(
    entropy: Tensor, actions: MacroActions, *, aggregation: Aggregation = "token_mean"
) -> LossOutput:
    """Negative entropy of the policy, to be added with a small coefficient.

    Args:
        entropy: like actions.ids.
        actions: segmentation, padded or packed.
        aggregation: see `token_weights`.
    """
    weights, count = token_weights(actions, aggregation, dtype=entropy.dtype)
    loss_sum = -(torch.where(actions.response_mask, entropy, 0.0) * weights).sum()
    return LossOutput(
        loss_sum=loss_sum, count=count, metrics={"entropy": (-loss_sum.detach(), count)}
    )


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    actions: MacroActions,
    *,
    estimator: LossKl = "k2",
    aggregation: Aggregation = "token_mean",
) -> LossOutput:
    """KL divergence from the reference as a loss term.

    Args:
        logprobs: like actions.ids, with gradient.
        ref_logprobs: like actions.ids.
        actions: segmentation, padded or packed.
        estimator: see `kl_estimate`.
        aggregation: see `token_weights`.
    """
    weights, count = token_weights(actions, aggregation, dtype=logprobs.dtype)
    mask = actions.response_mask
    kl = kl_estimate(
        torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), estimator
    )
    loss_sum = (kl * weights).sum()
    return LossOutput(loss_sum=loss_sum, count=count, metrics={"kl": (loss_sum.detach(), count)})


def sft_loss(logprobs: Tensor, response_mask: Tensor) -> LossOutput:
    """Cross-entropy of the response tokens; prompt and padding do not count.

    Args:
        logprobs: any shape, of the target tokens.
        response_mask: same shape, bool, True on response tokens.
    """
    loss_sum = -torch.where(response_mask, logprobs, 0.0).sum()
    count = response_mask.sum().to(logprobs.dtype)
    return LossOutput(loss_sum=loss_sum, count=count, metrics={})


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    chosen_probability: Tensor | float = 1.0,
    center_coef: float = 0.0,
) -> LossOutput:
    """Bradley-Terry loss of a reward model on scores of the last token.

    With D = chosen - rejected - margin and p = chosen_probability:
    -(p log sigma(D) + (1 - p) log sigma(-D)) + center_coef (chosen + rejected)^2.

    Args:
        chosen: [pairs] scores.
        rejected: [pairs] scores.
        margin: by how much the chosen score should exceed the rejected one; scalar or [pairs].
        chosen_probability: soft label, 1 - label smoothing; scalar or [pairs].
        center_coef: weight of the term that keeps scores near zero.
    """
    loss = preference_terms(chosen - rejected - margin, chosen_probability)
    loss = loss + center_coef * (chosen + rejected).square()
    return _pair_output(loss.sum(), chosen, rejected)


def preference_span_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    margin: Tensor | float = 0.0,
    chosen_probability: Tensor | float = 1.0,
    center_coef: float = 0.0,
) -> LossOutput:
    """Bradley-Terry loss on every position from the first differing token on.

    Per pair the mean over [first difference, end of the longer response). Past its end the shorter
    response keeps its last score, so padding is never read.

    Args:
        chosen: [pairs, response] scores of every prefix, right-padded.
        rejected: [pairs, response], likewise.
        chosen_tokens: [pairs, response] token ids.
        rejected_tokens: [pairs, response] token ids.
        chosen_mask: [pairs, response] bool.
        rejected_mask: [pairs, response] bool.
        margin: scalar or [pairs], see `preference_loss`.
        chosen_probability: scalar or [pairs], see `preference_loss`.
        center_coef: as in `preference_loss`, for the last scores.
    """
    chosen, last_chosen = _hold_last(chosen, chosen_mask)
    rejected, last_rejected = _hold_last(rejected, rejected_mask)
    differs = (chosen_mask != rejected_mask) | ((chosen_tokens != rejected_tokens) & chosen_mask)
    span = (differs.cumsum(1) > 0) & (chosen_mask | rejected_mask)
    weights = span / span.sum(1, keepdim=True).clamp(min=1)
    terms = preference_terms(chosen - rejected - _column(margin), _column(chosen_probability))
    loss_sum = (terms * weights).sum()
    loss_sum = loss_sum + center_coef * (last_chosen + last_rejected).square().sum()
    return _pair_output(loss_sum, last_chosen, last_rejected)


def preference_terms(lead: Tensor, chosen_probability: Tensor | float) -> Tensor:
    """-(p log sigma(D) + (1 - p) log sigma(-D)), which is softplus(-D) + (1 - p) D."""
    return F.softplus(-lead) + (1.0 - chosen_probability) * lead


def _hold_last(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Replace padding by the last score, and return that last score [pairs] too."""
    last = scores.gather(1, mask.sum(1, keepdim=True).clamp(min=1) - 1)
    return torch.where(mask, scores, last), last.squeeze(1)


def _column(per_pair: Tensor | float) -> Tensor | float:
    return per_pair.unsqueeze(1) if isinstance(per_pair, Tensor) and per_pair.dim() else per_pair


def _pair_output(loss_sum: Tensor, chosen: Tensor, rejected: Tensor) -> LossOutput:
    count = loss_sum.new_tensor(chosen.numel())
    with torch.no_grad():
        both = torch.cat((chosen, rejected))
        metrics = {
            "accuracy": ((chosen > rejected).sum().to(count), count),
            "margin": ((chosen - rejected).sum(), count),
            "score": (both.sum(), 2 * count),
            "score_square": (both.square().sum(), 2 * count),
        }
    return LossOutput(loss_sum=loss_sum, count=count, metrics=metrics)
