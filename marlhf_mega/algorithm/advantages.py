"""Semi-Markov advantages: rewards and values pooled to macro actions, GAE over macro steps.

MA-RLHF (arXiv 2410.02743), section on policy optimisation with macro actions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from marlhf_mega.algorithm.macro_actions import MacroActions, ValueRule, value_weights

MacroReward = Literal["sum", "mean"]
Unit = Literal["per_macro", "per_token"]


@dataclass(frozen=True, kw_only=True)
class MacroAdvantages:
    """Advantages and what they came from. All without gradient, zero on padding."""

    rewards: Tensor
    """[batch, macro] pooled rewards R_k."""
    values: Tensor
    """[batch, macro] pooled old values V_k."""
    advantages: Tensor
    """[batch, macro] A_k."""
    returns: Tensor
    """[batch, macro] G_k = A_k + V_k."""
    token_advantages: Tensor
    """Like MacroActions.ids: A_k of the token's macro action."""
    token_returns: Tensor
    """Like MacroActions.ids: G_k of the token's macro action."""


@torch.no_grad()
def macro_advantages(
    rewards: Tensor,
    values: Tensor,
    actions: MacroActions,
    *,
    value_rule: ValueRule,
    macro_reward: MacroReward,
    gamma: float,
    gae_lambda: float,
    discount: Unit = "per_macro",
    lambda_unit: Unit = "per_macro",
) -> MacroAdvantages:
    """Pool token rewards and values to macro actions and run GAE over macro steps.

    Args:
        rewards: like actions.ids, token rewards; padding is ignored.
        values: like actions.ids, critic estimate before each token; padding is ignored.
        actions: segmentation, padded or packed.
        value_rule: how token values are averaged, see `value_weights`.
        macro_reward: "sum" of the token rewards, or "mean" with the value weights (the released
            code, which divides the KL penalty by the length of the action).
        gamma: discount in [0, 1].
        gae_lambda: trace in [0, 1].
        discount: gamma per macro step, or per token: gamma^length, and token rewards inside an
            action discounted to its first token.
        lambda_unit: trace per macro step, or per token: lambda^length.
    """
    weights = value_weights(actions, value_rule, dtype=values.dtype)
    if macro_reward == "mean":
        macro_rewards = actions.pool(rewards * weights)
    elif discount == "per_token" and gamma != 1.0:
        decay = _powers(gamma, actions.offsets().clamp(min=0), rewards.dtype)
        macro_rewards = actions.pool(rewards * decay)
    else:
        macro_rewards = actions.pool(rewards)
    macro_values = actions.pool(values * weights)
    advantages = gae(
        macro_rewards,
        macro_values,
        discounts=_powers(gamma, _durations(actions, discount), values.dtype),
        traces=_powers(gae_lambda, _durations(actions, lambda_unit), values.dtype),
    )
    returns = advantages + macro_values
    return MacroAdvantages(
        rewards=macro_rewards,
        values=macro_values,
        advantages=advantages,
        returns=returns,
        token_advantages=actions.spread(advantages),
        token_returns=actions.spread(returns),
    )


def _durations(actions: MacroActions, unit: Unit) -> Tensor:
    """Length of every macro step in the unit, broadcastable to [batch, macro]."""
    return actions.lengths if unit == "per_token" else actions.lengths.new_ones(())


def _powers(factor: float, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    # The base is a tensor because a Python float and integer exponents would give float32.
    return torch.full((), factor, dtype=dtype, device=exponents.device) ** exponents


def gae(rewards: Tensor, values: Tensor, *, discounts: Tensor, traces: Tensor) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438) on right-padded rows.

    delta_k = R_k + discount_k * V_{k+1} - V_k with V = 0 after the last step;
    A_k = delta_k + discount_k * trace_k * A_{k+1}.

    Args:
        rewards: [batch, macro], zero on padding.
        values: likewise.
        discounts: scalar or [batch, macro].
        traces: likewise.

    Returns:
        [batch, macro] advantages, zero on padding.
    """
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    deltas = rewards + discounts * next_values - values
    return reverse_scan(deltas, (discounts * traces).expand_as(deltas))


def reverse_scan(terms: Tensor, factors: Tensor) -> Tensor:
    """Solve y_k = terms_k + factors_k * y_{k+1}, y = 0 beyond the row, in log2(row) steps.

    After step i entry k holds the sum over the next 2^i entries. Zero padding on the right adds
    exact zeros, so a row's result does not depend on how far the batch is padded.

    Args:
        terms: [batch, length].
        factors: [batch, length].
    """
    terms, factors = terms.t().contiguous(), factors.t()
    length, span = terms.size(0), 1
    while span < length:
        head = torch.addcmul(terms[:-span], factors[: length - span], terms[span:])
        terms = torch.cat((head, terms[-span:]))
        factors = factors[:-span] * factors[span:]  # of twice the span, where both exist
        span *= 2
    return terms.t().contiguous()


def leave_one_out(scores: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Advantage of each response over the other responses to its prompt (RLOO, arXiv 2402.14740).

    Args:
        scores: [batch] one score per response, responses to one prompt next to each other.
        samples_per_prompt: at least 2.

    Returns:
        [batch] score minus the mean of the others.
    """
    groups = _groups(scores, samples_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (samples_per_prompt - 1)
    return (groups - others).flatten()


def group_normalised(scores: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Score minus the group's mean over the group's standard deviation (GRPO, arXiv 2402.03300)."""
    groups = _groups(scores, samples_per_prompt)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def _groups(scores: Tensor, samples_per_prompt: int) -> Tensor:
    if samples_per_prompt < 2:
        raise ValueError(
            f"rollout.samples_per_prompt={samples_per_prompt}: must be at least 2 to compare "
            "responses to one prompt. Sample more, or use a critic."
        )
    return scores.view(-1, samples_per_prompt)
