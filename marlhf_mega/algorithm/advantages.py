"""Advantages over a critic: GAE over macro actions, and per token with traces cut at their ends.

MA-RLHF (arXiv 2410.02743), section on policy optimisation with macro actions. Estimators without a
critic are in `group_advantages`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import MacroReward, StepUnit, ValueRule, check_choice
from marlhf_mega.algorithm.macro_actions import MacroActions, value_weights


@dataclass(frozen=True, kw_only=True)
class MacroAdvantages:
    """Advantages and what they were computed from. Without gradient, zero on padding."""

    steps: MacroActions
    """What the macro grid below is over: the macro actions, or single tokens."""
    rewards: Tensor
    """[batch, macro] pooled rewards R_k."""
    values: Tensor
    """[batch, macro] pooled old values V_k."""
    advantages: Tensor
    """[batch, macro] A_k."""
    returns: Tensor
    """[batch, macro] G_k = A_k + V_k, with the A_k of the critic's lambda."""

    @property
    def token_advantages(self) -> Tensor:
        """Like MacroActions.ids: A_k of the token's step."""
        return self.steps.spread(self.advantages)

    @property
    def token_returns(self) -> Tensor:
        """Like MacroActions.ids: G_k of the token's step."""
        return self.steps.spread(self.returns)


@torch.no_grad()
def macro_advantages(
    rewards: Tensor,
    values: Tensor,
    actions: MacroActions,
    *,
    value_rule: ValueRule,
    macro_reward: MacroReward,
    gamma: float,
    gae_lambda: float | Tensor,
    critic_lambda: float | None = None,
    discount: StepUnit = "per_macro",
    lambda_unit: StepUnit = "per_macro",
) -> MacroAdvantages:
    """Pool token rewards and values over macro actions and run GAE over the actions.

    Args:
        rewards: shape of actions.ids, token rewards; padding is ignored.
        values: shape of actions.ids, value before each token; padding is ignored.
        actions: segmentation, padded or packed.
        value_rule: how token values are averaged, see `value_weights`.
        macro_reward: "sum" of the token rewards, or "mean" with the value weights, as in the
            released code, which divides the KL penalty by the length of the action.
        gamma: discount in [0, 1].
        gae_lambda: lambda in [0, 1]; or one for each response [batch, 1], see `adaptive_lambda`.
        critic_lambda: lambda of the returns (VC-PPO, arXiv 2503.01491); None means `gae_lambda`.
        discount: gamma per action, or per token: gamma^length, with the token rewards inside an
            action discounted to its first token.
        lambda_unit: lambda per action, or per token: lambda^length.
    """
    check_choice("macro_reward", macro_reward, MacroReward)
    check_choice("discount", discount, StepUnit)
    check_choice("lambda_unit", lambda_unit, StepUnit)
    weights = value_weights(actions, value_rule, dtype=values.dtype)
    if macro_reward == "mean":
        macro_rewards = actions.pool(rewards * weights)
    elif discount == "per_token" and gamma != 1.0:
        decay = _powers(gamma, actions.offsets().clamp(min=0), rewards.dtype)
        macro_rewards = actions.pool(rewards * decay)
    else:
        macro_rewards = actions.pool(rewards)
    macro_values = actions.pool(values * weights)
    durations = _durations(actions, lambda_unit)
    return _advantages(
        macro_rewards,
        macro_values,
        actions,
        discounts=_powers(gamma, _durations(actions, discount), values.dtype),
        traces=_powers(gae_lambda, durations, values.dtype),
        critic_traces=(
            None if critic_lambda is None else _powers(critic_lambda, durations, values.dtype)
        ),
    )


@torch.no_grad()
def segment_advantages(
    rewards: Tensor,
    values: Tensor,
    actions: MacroActions,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    critic_lambda: float | None = None,
    discount: StepUnit = "per_macro",
) -> MacroAdvantages:
    """Segmental advantage estimation (SAE, arXiv 2601.07320): token GAE that decays at boundaries.

    delta_t = r_t + v_{t+1} - v_t; A_t = delta_t + lambda_t A_{t+1}, where lambda_t is 1 inside a
    macro action and lambda on its last token. With actions of one token it is ordinary GAE, with
    one action per response Monte Carlo.

    Args:
        rewards: as in `macro_advantages`.
        values: as in `macro_advantages`.
        actions: segmentation, padded or packed; the paper's is `termination.probability`.
        gamma: discount in [0, 1].
        gae_lambda: as in `macro_advantages`.
        critic_lambda: as in `macro_advantages`.
        discount: gamma at the boundaries only, or at every token.

    Returns:
        Advantages whose steps are the tokens.
    """
    tokens = actions.per_token()
    is_last = tokens.pool(value_weights(actions, "unit", dtype=values.dtype))

    def at_boundaries(factor: float | Tensor) -> Tensor:
        return _powers(factor, is_last, values.dtype)

    return _advantages(
        tokens.pool(rewards),
        tokens.pool(values),
        tokens,
        discounts=at_boundaries(gamma) if discount == "per_macro" else is_last.new_tensor(gamma),
        traces=at_boundaries(gae_lambda),
        critic_traces=None if critic_lambda is None else at_boundaries(critic_lambda),
    )


def _advantages(
    rewards: Tensor,
    values: Tensor,
    steps: MacroActions,
    *,
    discounts: Tensor,
    traces: Tensor,
    critic_traces: Tensor | None,
) -> MacroAdvantages:
    """Run `gae` for the policy and, where its traces differ, for the critic."""
    advantages = gae(rewards, values, discounts=discounts, traces=traces)
    errors = advantages
    if critic_traces is not None:
        errors = gae(rewards, values, discounts=discounts, traces=critic_traces)
    return MacroAdvantages(
        steps=steps,
        rewards=rewards,
        values=values,
        advantages=advantages,
        returns=errors + values,
    )


def adaptive_lambda(actions: MacroActions, *, alpha: float, unit: StepUnit) -> Tensor:
    """Lambda that grows with the length of a response: 1 - 1 / (alpha length), at least 0.

    VAPO (arXiv 2504.05118), for the policy; the paper's alpha is 0.05.

    Args:
        actions: segmentation.
        alpha: above 0.
        unit: whether a length counts macro actions or tokens, as lambda does.

    Returns:
        [batch, 1] float64.
    """
    counts = actions.lengths if unit == "per_token" else actions.lengths > 0
    length = counts.sum(1, keepdim=True).double().clamp(min=1)
    return (1 - 1 / (alpha * length)).clamp(min=0)


def _durations(actions: MacroActions, unit: StepUnit) -> Tensor:
    """Length of every action in the unit, broadcastable to [batch, macro]."""
    return actions.lengths if unit == "per_token" else actions.lengths.new_ones(())


def _powers(factor: float | Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    # The base is a tensor because a Python float with integer exponents would give float32.
    return torch.as_tensor(factor, dtype=dtype, device=exponents.device) ** exponents


def gae(rewards: Tensor, values: Tensor, *, discounts: Tensor, traces: Tensor) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438) on right-padded sequences.

    delta_k = R_k + discount_k * V_{k+1} - V_k with V = 0 after the last step;
    A_k = delta_k + discount_k * trace_k * A_{k+1}.

    Args:
        rewards: [batch, macro], zero on padding.
        values: [batch, macro], zero on padding.
        discounts: scalar or [batch, macro].
        traces: scalar or [batch, macro].

    Returns:
        [batch, macro] advantages, zero on padding.
    """
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    deltas = rewards + discounts * next_values - values
    return reverse_scan(deltas, (discounts * traces).expand_as(deltas))


def reverse_scan(terms: Tensor, factors: Tensor) -> Tensor:
    """Solve y_k = terms_k + factors_k * y_{k+1}, with y = 0 past the end, in log2(length) steps.

    After step i, entry k holds the sum over the next 2^i entries. Zero padding on the right adds
    exact zeros, so a sequence's result does not depend on the padding of the batch.

    Args:
        terms: [batch, length].
        factors: [batch, length].
    """
    terms, factors = terms.t().contiguous(), factors.t()
    length, span = terms.size(0), 1
    while span < length:
        head = torch.addcmul(terms[:-span], factors[: length - span], terms[span:])
        terms = torch.cat((head, terms[-span:]))
        factors = factors[:-span] * factors[span:]  # over twice the span, where both exist
        span *= 2
    return terms.t().contiguous()
