"""Policy losses besides the clipped surrogate of `losses.policy_loss`, with the same contract."""

import math

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import Aggregation, Ratio
from marlhf_mega.algorithm.losses import MAX_LOG_RATIO, LossOutput, log_ratios, token_weights
from marlhf_mega.algorithm.macro_actions import MacroActions

MAX_PAIR_WEIGHT = 10.0
"""P3O clips the likelihood ratio of a pair to [1 / this, this], as its authors' code does."""


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: MacroActions,
    *,
    ratio: Ratio = "token",
    aggregation: Aggregation = "token_mean",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> LossOutput:
    """Clip the weight of a token, not its gradient: -sg(clip(rho, 1 - eps, 1 + high)) A log pi.

    CISPO (MiniMax-M1, arXiv 2506.13585), eq. 4 and 5. Arguments as in `losses.policy_loss`.
    """
    weights, count = token_weights(actions, aggregation, dtype=logprobs.dtype)
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = log_ratios(logprobs, old_logprobs, actions, ratio).detach()
    rho = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = rho.clamp(1.0 - clip_range, 1.0 + high)
    gains = clipped * advantages * logprobs
    metrics = {
        "clip_fraction": (((clipped != rho) * weights).sum(), count),
        "approx_kl": (((rho - 1.0 - log_ratio) * weights).sum(), count),
        "ratio": ((rho * weights).sum(), count),
    }
    return LossOutput(loss_sum=-(gains * weights).sum(), count=count, metrics=metrics)


def pg_loss(
    logprobs: Tensor,
    advantages: Tensor,
    actions: MacroActions,
    *,
    aggregation: Aggregation = "token_mean",
) -> LossOutput:
    """Policy gradient without a ratio, -A log pi (REINFORCE), as ReMax has it (arXiv 2310.10505).

    Args:
        logprobs: like actions.ids, of the policy being trained.
        advantages: like actions.ids, without gradient.
        actions: segmentation, padded or packed.
        aggregation: see `token_weights`.
    """
    weights, count = token_weights(actions, aggregation, dtype=logprobs.dtype)
    gains = advantages * logprobs * weights
    return LossOutput(loss_sum=-gains.sum(), count=count, metrics={})


def unlikely_tokens(actions: MacroActions, old_logprobs: Tensor, *, limit: float) -> Tensor:
    """Find the tokens that the policy learns from: those it found no likelier than the limit.

    Probability mask of SPO (arXiv 2505.23564), as in its code, with the limit 0.9: what was nearly
    certain takes no part in the loss, its count and the whitening of advantages.

    Args:
        actions: segmentation.
        old_logprobs: [batch, response] of the policy at rollout.
        limit: probability.

    Returns:
        bool [batch, response], False on padding.
    """
    return actions.response_mask & (old_logprobs <= math.log(limit))


def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: MacroActions,
    *,
    kl_coef: float,
    clip_range: float = 0.2,
) -> LossOutput:
    """Pairwise policy gradient: only the difference of two responses to a prompt counts.

    P3O (arXiv 2310.00212), jointly clipped (V2). With l the sum over a response of log pi - log
    pi_old, D = l_1 - l_2, q = sg(A_1 - A_2 - kl_coef D) and w = sg(clip(exp(l_1 + l_2), 1/10, 10)),
    the loss of a pair is max(-q w D, -q w clip(D, -eps, eps)) / 2. The authors' D holds log pi -
    log pi_ref: that adds q w D_old / 2, which has no gradient. Their q is the difference of the
    scores less kl_coef times the present divergence's, which is ours where the advantages hold the
    KL penalty of the rollout.

    Args:
        logprobs: [batch, response], of the policy being trained; rows 2 i and 2 i + 1 are a pair.
        old_logprobs: the same shape, of the policy at rollout.
        advantages: the same shape, one number in each row: the return, or one less a baseline.
        actions: segmentation; a pair of which one row is empty does not count.
        kl_coef: weight of the KL penalty in the advantages.
        clip_range: eps, in nats.

    Returns:
        The mean over pairs, as a sum over the sequences.
    """
    lengths = actions.lengths.sum(1)
    shift = actions.pool(logprobs - old_logprobs).sum(1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    first, second = shift.view(-1, 2).unbind(1)
    with torch.no_grad():
        level = actions.pool(advantages).sum(1) / lengths.clamp(min=1)
        lead = level.view(-1, 2) @ level.new_tensor([1.0, -1.0])
        weight = (first + second).exp().clamp(1 / MAX_PAIR_WEIGHT, MAX_PAIR_WEIGHT)
        factor = -(lead - kl_coef * (first - second)) * weight
        factor = factor * (lengths.view(-1, 2) > 0).all(1)
    gap = first - second
    unclipped = factor * gap
    losses = torch.maximum(unclipped, factor * gap.clamp(-clip_range, clip_range))
    count = (lengths > 0).sum().to(logprobs.dtype)
    with torch.no_grad():
        clipped = 2 * (losses != unclipped).sum().to(logprobs.dtype)
    return LossOutput(
        loss_sum=losses.sum(), count=count, metrics={"clip_fraction": (clipped, count)}
    )
