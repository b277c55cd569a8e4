"""Rewards -> advantages: the estimator of the configuration on one replica's samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.advantages import (
    MacroAdvantages,
    adaptive_lambda,
    macro_advantages,
    segment_advantages,
)
from marlhf_mega.algorithm.continuations import continuation_advantages
from marlhf_mega.algorithm.group_advantages import (
    group_centred,
    group_normalised,
    leave_one_out,
    posterior_weights,
    returns_to_go,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.masked import masked_moments, mean_and_variance, whiten
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the update learns from."""

    advantages: Tensor
    """[batch, response], whitened if asked for; 0 on padding."""
    returns: Tensor | None
    """[batch, response] targets of the critic; None without one."""
    unwhitened: Tensor
    """[batch, response] the advantages before whitening; 0 on padding."""


def estimate_advantages(
    rewards: Tensor,
    actions: MacroActions,
    config: Config,
    mesh: Mesh,
    *,
    values: Tensor | None,
    baselines: Tensor | None,
    sample_indices: Sequence[int],
    log_ratios: Tensor | None = None,
    learned: Tensor | None = None,
) -> Estimate:
    """Estimate the advantages of this replica's tokens. All ranks call it.

    Args:
        rewards: [batch, response] token rewards, 0 on padding.
        actions: segmentation; samples without a score have none.
        config: of the run.
        mesh: this rank's mesh.
        values: [batch, response] of the critic, if the estimator has one; [batch, macro] of
            continuations for `vine`.
        baselines: [batch] scores of greedy responses, for `remax`.
        sample_indices: global index of every sample within the step.
        log_ratios: [batch] log-probs of whole responses over those by the sampler, for `brain`;
            None means that there is no difference.
        learned: bool [batch, response], the tokens to whiten over; None means all.
    """
    ppo, macro = config.ppo, config.macro
    steps, returns = actions, None
    over_groups = partial(_over_groups, rewards, actions, config, mesh, sample_indices)
    match ppo.estimator:
        case "gae" | "sae":
            assert values is not None
            outcome = _over_values(rewards, values, actions, config)
            steps, grid, returns = outcome.steps, outcome.advantages, outcome.token_returns
        case "reinforce_pp" | "remax":
            grid = returns_to_go(
                rewards,
                actions,
                baselines=baselines,
                value_rule=macro.value,
                macro_reward=macro.reward,
                gamma=ppo.gamma,
                discount=macro.discount,
            )
        case "vine":
            assert values is not None
            grid = continuation_advantages(
                rewards,
                values,
                actions,
                value_rule=macro.value,
                macro_reward=macro.reward,
                gamma=ppo.gamma,
                discount=macro.discount,
            )
        case "rloo":
            grid = over_groups(leave_one_out)
        case "grpo":
            grid = over_groups(group_normalised)
        case "dr_grpo" | "reinforce_pp_baseline":
            grid = over_groups(group_centred)
        case "brain":
            ratios = torch.zeros_like(rewards[:, 0]) if log_ratios is None else log_ratios
            ratios = _whole(ratios, config, mesh, sample_indices)
            grid = over_groups(partial(posterior_weights, log_ratios=ratios, beta=ppo.kl_coef))
    unwhitened = steps.spread(grid)
    if ppo.whiten_advantages:
        # By tokens, or by actions if the loss is a mean of those.
        by_action = ppo.aggregation == "macro_mean"
        lengths = steps.lengths if learned is None else steps.pool(learned.long())
        weights = (lengths > 0) if by_action else lengths
        moments = sum_over_data(masked_moments(grid, weights), mesh)
        mean, variance = mean_and_variance(moments)
        grid = whiten(grid, weights, mean=mean, variance=variance)
    return Estimate(advantages=steps.spread(grid), returns=returns, unwhitened=unwhitened)


def _over_values(
    rewards: Tensor, values: Tensor, actions: MacroActions, config: Config
) -> MacroAdvantages:
    ppo, macro = config.ppo, config.macro
    gae_lambda: float | Tensor = ppo.gae_lambda
    critic_lambda = ppo.gae_lambda_critic
    if ppo.gae_lambda_alpha is not None:
        gae_lambda = adaptive_lambda(actions, alpha=ppo.gae_lambda_alpha, unit=macro.lambda_unit)
    if ppo.estimator == "sae":
        return segment_advantages(
            rewards,
            values,
            actions,
            gamma=ppo.gamma,
            gae_lambda=gae_lambda,
            critic_lambda=critic_lambda,
            discount=macro.discount,
        )
    return macro_advantages(
        rewards,
        values,
        actions,
        value_rule=macro.value,
        macro_reward=macro.reward,
        gamma=ppo.gamma,
        gae_lambda=gae_lambda,
        critic_lambda=critic_lambda,
        discount=macro.discount,
        lambda_unit=macro.lambda_unit,
    )


def _over_groups(
    rewards: Tensor,
    actions: MacroActions,
    config: Config,
    mesh: Mesh,
    sample_indices: Sequence[int],
    compare: Callable[..., Tensor],
) -> Tensor:
    """Compare the returns of the responses to each prompt, wherever they are: [batch, macro]."""
    own = torch.stack((rewards.double().sum(1), actions.response_mask.any(1).double()))
    returns, counts = _whole(own, config, mesh, sample_indices)
    size = config.rollout.trained_per_prompt
    found = compare(returns, counts > 0, samples_per_prompt=size)[list(sample_indices)]
    return found.to(rewards.dtype)[:, None].expand(actions.lengths.shape)


def _whole(own: Tensor, config: Config, mesh: Mesh, sample_indices: Sequence[int]) -> Tensor:
    """Return [..., samples] of all replicas, from this one's [..., batch], float64."""
    whole = own.new_zeros(*own.shape[:-1], config.rollout.trained_size, dtype=torch.float64)
    whole[..., list(sample_indices)] = own.double()
    return sum_over_data(whole, mesh)
