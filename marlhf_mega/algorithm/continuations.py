"""Advantages over values that are found by trying: the mean score of continuations."""

import torch
from torch import Tensor

from marlhf_mega.algorithm.advantages import macro_advantages
from marlhf_mega.algorithm.choices import MacroReward, StepUnit, ValueRule
from marlhf_mega.algorithm.macro_actions import MacroActions


def continuation_values(scores: Tensor, places: Tensor, actions: MacroActions) -> Tensor:
    """Mean score of the continuations from the start of each macro action.

    Args:
        scores: [continuations], NaN where there is none.
        places: [continuations] int64, flat index into [batch, macro] of the action that each starts
            at.
        actions: segmentation.

    Returns:
        [batch, macro]; NaN where no continuation has a score, 0 past a response's last action.
    """
    has_score = ~scores.isnan()
    kept = places[has_score]
    sums = scores.new_zeros(actions.lengths.numel()).index_add(0, kept, scores[has_score])
    counts = torch.zeros_like(sums).index_add(0, kept, torch.ones_like(scores[has_score]))
    return torch.where(actions.lengths > 0, (sums / counts).view_as(actions.lengths), 0.0)


def continuation_advantages(
    rewards: Tensor,
    values: Tensor,
    actions: MacroActions,
    *,
    value_rule: ValueRule,
    macro_reward: MacroReward,
    gamma: float,
    discount: StepUnit,
) -> Tensor:
    """What each macro action adds to the value: A_k = R_k + gamma V_{k+1} - V_k, 0 after the last.

    VinePPO (arXiv 2410.01679), section 4, whose actions are steps of a reasoning; with actions that
    start at unlikely tokens it is the chain of Segment Policy Optimization (arXiv 2505.23564). The
    KL penalty is part of the rewards, not of the values.

    Args:
        rewards: shape of actions.ids, token rewards; padding is ignored.
        values: [batch, macro] of `continuation_values`.
        actions: segmentation, padded or packed.
        value_rule: as in `macro_advantages`; weights rewards if `macro_reward` is "mean".
        macro_reward: as in `macro_advantages`.
        gamma: discount in [0, 1].
        discount: as in `macro_advantages`.

    Returns:
        [batch, macro], 0 on padding.
    """
    return macro_advantages(
        rewards,
        actions.spread(values),
        actions,
        value_rule=value_rule,
        macro_reward=macro_reward,
        gamma=gamma,
        gae_lambda=0.0,
        discount=discount,
    ).advantages
