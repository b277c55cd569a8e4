"""Offline losses of Advantage Leftover Lunch RL (A-LoL, arXiv 2305.14718).

Each fixed response has a reward and is one action. S is the sum of its log-probs, S0 that of the
reference, A = reward - value of the prompt, A+ = max(A, 0). Weights carry no gradient.
Every loss is a sum over responses, and its count is their number.
"""

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import (
    OfflineAlgorithm,
    OfflineCompat,
    PrioritySampling,
    check_choice,
)
from marlhf_mega.algorithm.losses import MAX_LOG_RATIO, LossOutput
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.masked import masked_sum


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    per_token: bool = False,
    actions: MacroActions | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Ratio policy / reference, clipped to 1 +- clip_range on both sides, unlike in PPO.

    Args:
        logprobs: [batch, response].
        ref_logprobs: [batch, response].
        response_mask: [batch, response] bool.
        per_token: ratios of tokens instead of responses.
        actions: ratios of these macro actions instead, which their tokens share.
        clip_range: None means no clipping.

    Returns:
        [batch], or [batch, response] with 0 on padding.
    """
    log_ratio = torch.where(response_mask, logprobs - ref_logprobs, 0.0)
    if actions is not None:
        log_ratio = actions.spread(actions.pool(log_ratio))
    elif not per_token:
        log_ratio = log_ratio.sum(1)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if clip_range is not None:
        ratio = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return ratio if ratio.dim() == 1 else torch.where(response_mask, ratio, 0.0)


def offline_loss(
    algorithm: OfflineAlgorithm,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    rewards: Tensor,
    values: Tensor,
    actions: MacroActions | None = None,
    clip_range: float | None = 0.9,
    kl_coef: float = 0.0,
    compat: OfflineCompat = "none",
) -> LossOutput:
    """Loss of one algorithm, summed over responses.

    Per response, with c its importance weight, c_t that of a token, c_k and S_k those of an action:
    nll -S; wbc -R S; r_gold -R sum_t max(p_t, 0.1) logp_t; r_lol -R c S; a_lol -A+ c S;
    a_lol_seq -A+ sum_t c_t logp_t; a_lol_macro -A+ sum_k c_k S_k; a_lol_ref_free -A+ S;
    a_lol_kl -A+ S + kl_coef (S - S0). a_lol_macro is ours: one action makes it a_lol, an action
    per token a_lol_seq.

    A sequence without response tokens does not count, provided that its reward and value are 0.

    Args:
        algorithm: see above.
        logprobs: [batch, response] of the policy, with gradient.
        ref_logprobs: [batch, response] of the reference; used by importance weights and KL only.
        response_mask: [batch, response] bool.
        rewards: [batch].
        values: [batch] of the prompts.
        actions: segmentation, for a_lol_macro.
        clip_range: of the importance weights; None means no clipping.
        kl_coef: weight of the KL term of a_lol_kl.
        compat: "lol_rl" has A in place of A+ in a_lol_ref_free, as the released code.
    """
    check_choice("algorithm", algorithm, OfflineAlgorithm)
    check_choice("compat", compat, OfflineCompat)
    advantages = rewards - values
    if not (compat == "lol_rl" and algorithm == "a_lol_ref_free"):
        advantages = advantages.clamp(min=0)
    scale = advantages if algorithm.startswith("a_lol") else rewards
    scale = torch.ones_like(scale) if algorithm == "nll" else scale
    if algorithm == "r_gold":
        weights = logprobs.detach().exp().clamp(min=0.1)
    elif algorithm in ("r_lol", "a_lol", "a_lol_seq", "a_lol_macro"):
        assert algorithm != "a_lol_macro" or actions is not None
        weights = importance_weights(
            logprobs,
            ref_logprobs,
            response_mask,
            per_token=algorithm == "a_lol_seq",
            actions=actions if algorithm == "a_lol_macro" else None,
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


def sampling_probabilities(advantages: Tensor, strategy: PrioritySampling) -> Tensor:
    """Probability of drawing each training response; those without a positive advantage have none.

    Args:
        advantages: [num] of the responses.
        strategy: good_priority, proportional to A+; good_random, uniform where A > 0;
            all_priority, as good_priority where the responses are both of every pair.

    Returns:
        [num]; all zero if no advantage is positive.
    """
    check_choice("strategy", strategy, PrioritySampling)
    weights = advantages.clamp(min=0)
    if strategy == "good_random":
        weights = (weights > 0).to(weights.dtype)
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1.0)
