"""Offline losses of Advantage Leftover Lunch RL (A-LoL, arXiv 2305.14718).

Fixed responses with a reward each; the whole response is one action. S is the sum of the response's
log-probs, S0 the reference's, A = reward - value of the prompt, A+ = max(A, 0). Weights carry no
gradient. Every loss is a sum over responses with their number as count.
"""

from typing import Literal

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import MAX_LOG_RATIO, LossOutput
from marlhf_mega.algorithm.masked import masked_sum

OfflineAlgorithm = Literal[
    "nll", "wbc", "r_gold", "r_lol", "a_lol", "a_lol_seq", "a_lol_ref_free", "a_lol_kl"
]
SamplingStrategy = Literal["good_priority", "good_random", "all_priority"]


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    per_token: bool = False,
    clip_range: float | None = None,
) -> Tensor:
    """Ratio policy / reference, clipped to 1 +- clip_range (both ways, not PPO's minimum).

    Args:
        logprobs: [batch, response].
        ref_logprobs: [batch, response].
        response_mask: [batch, response] bool.
        per_token: ratios of tokens instead of responses.
        clip_range: None is no clipping.

    Returns:
        [batch], or [batch, response] with 0 on padding.
    """
    log_ratio = torch.where(response_mask, logprobs - ref_logprobs, 0.0)
    if not per_token:
        log_ratio = log_ratio.sum(1)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if clip_range is not None:
        ratio = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.where(response_mask, ratio, 0.0) if per_token else ratio


def offline_loss(
    algorithm: OfflineAlgorithm,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    rewards: Tensor,
    values: Tensor,
    clip_range: float | None = 0.9,
    kl_coef: float = 0.0,
    clamp_advantages: bool = True,
) -> LossOutput:
    """Loss of one algorithm, summed over responses.

    Per response, with c the importance weight of the response and c_t of a token:
    nll -S; wbc -R S; r_gold -R sum_t max(p_t, 0.1) logp_t; r_lol -R c S; a_lol -A+ c S;
    a_lol_seq -A+ sum_t c_t logp_t; a_lol_ref_free -A+ S; a_lol_kl -A+ S + kl_coef (S - S0).

    A row without a token counts as none, if its reward and value are 0.

    Args:
        algorithm: see above.
        logprobs: [batch, response] of the policy, with gradient.
        ref_logprobs: [batch, response] of the frozen reference; unused without a weight or KL.
        response_mask: [batch, response] bool.
        rewards: [batch].
        values: [batch] of the prompts.
        clip_range: of the importance weights; None is no clipping.
        kl_coef: weight of the KL term of a_lol_kl.
        clamp_advantages: False uses A instead of A+.
    """
    advantages = rewards - values
    if clamp_advantages:
        advantages = advantages.clamp(min=0)
    scale = advantages if algorithm.startswith("a_lol") else rewards
    scale = torch.ones_like(scale) if algorithm == "nll" else scale
    if algorithm == "r_gold":
        weights = logprobs.detach().exp().clamp(min=0.1)
    elif algorithm in ("r_lol", "a_lol", "a_lol_seq"):
        weights = importance_weights(
            logprobs,
            ref_logprobs,
            response_mask,
            per_token=algorithm == "a_lol_seq",
            clip_range=clip_range,
        )
        weights = weights if weights.dim() == 2 else weights.unsqueeze(1)
    else:
        weights = torch.ones_like(logprobs)
    losses = -scale * masked_sum(weights * logprobs, response_mask, 1)
    kl = masked_sum(logprobs - ref_logprobs, response_mask, 1)
    if algorithm == "a_lol_kl":
        losses = losses + kl_coef * kl
    count = response_mask.any(1).sum().to(losses.dtype)
    metrics = {
        "advantage": ((rewards - values).sum(), count),
        "kl": (kl.detach().sum(), count),
    }
    return LossOutput(loss_sum=losses.sum(), count=count, metrics=metrics)


def sampling_probabilities(
    advantages: Tensor, strategy: SamplingStrategy, rejected_advantages: Tensor | None = None
) -> Tensor:
    """Probability of drawing each training response; those without a positive advantage have none.

    Args:
        advantages: [num] of the (preferred) responses.
        strategy: good_priority, proportional to A+; good_random, uniform over A > 0; all_priority,
            proportional to A+ over both responses of every pair.
        rejected_advantages: [num] of the other responses, for all_priority.

    Returns:
        [num], or [2 num] for all_priority: preferred responses, then the others. Zeros if no
        advantage is positive.
    """
    if strategy == "all_priority":
        assert rejected_advantages is not None
        advantages = torch.cat((advantages, rejected_advantages))
    weights = advantages.clamp(min=0)
    if strategy == "good_random":
        weights = (weights > 0).to(weights.dtype)
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1.0)
