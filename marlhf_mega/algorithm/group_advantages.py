"""Advantages without a critic: the return of a response against others to its prompt.

Those that compare responses take the whole rollout batch, of all data-parallel ranks: returns
[batch] float64, the responses to a prompt adjacent, and which of them count. Samples without a
score take no part: the rest of their group is compared, and a response left alone gets 0.
"""

import torch
from torch import Tensor

from marlhf_mega.algorithm.advantages import macro_advantages
from marlhf_mega.algorithm.choices import MacroReward, StepUnit, ValueRule
from marlhf_mega.algorithm.macro_actions import MacroActions


def leave_one_out(returns: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Return minus the mean of the others in the group (RLOO, arXiv 2402.14740).

    Args:
        returns: [batch] R_i, the sum of the response's token rewards; any number where not valid.
        valid: [batch] bool.
        samples_per_prompt: size of a group.

    Returns:
        [batch] A_i = n / (n - 1) (R_i - mean) with the n valid responses of the group.
    """
    centred, count = _centred(returns, valid, samples_per_prompt)
    return (centred * count / (count - 1).clamp(min=1)).flatten()


def group_normalised(returns: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Return minus the group's mean, over its unbiased standard deviation plus 1e-6.

    GRPO (arXiv 2402.03300), section 4.1.2. Arguments and result as in `leave_one_out`.
    """
    centred, count = _centred(returns, valid, samples_per_prompt)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return (centred / (variance.sqrt() + 1e-6)).flatten()


def group_centred(returns: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Return minus the group's mean.

    Dr. GRPO (arXiv 2503.20783), section 3.2; the loss that goes with it is a sum over tokens.
    Whitened over the tokens of the batch it is the baseline variant of REINFORCE++ (arXiv
    2501.03262). Arguments and result as in `leave_one_out`.
    """
    return _centred(returns, valid, samples_per_prompt)[0].flatten()


def posterior_weights(
    returns: Tensor,
    valid: Tensor,
    *,
    samples_per_prompt: int,
    log_ratios: Tensor,
    beta: float,
) -> Tensor:
    """Share of the reward's posterior minus share of the policy (BRAIn, arXiv 2402.02479).

    a - b with a = softmax(r / beta + log prior - log q) and b = softmax(log p - log q) over a
    group, q the policy that drew the responses: their log-likelihoods weighted by it are the
    gradient. The prior is the reference, so that a KL penalty of weight beta in the return carries
    it: a = softmax(R / beta + log p - log q). The two weights are those of the authors' code; that
    the posterior has this form is not verified, nor are beta and the size of a group.

    Args:
        returns: [batch] R_i = r_i - beta (log p - log prior); any number where not valid.
        valid: [batch] bool.
        samples_per_prompt: size of a group.
        log_ratios: [batch] log p - log q of the whole response; 0 where p drew it.
        beta: weight of the KL penalty.

    Returns:
        [batch]; a response left alone in its group gets 0.
    """
    kept = valid.view(-1, samples_per_prompt)

    def shares(logits: Tensor) -> Tensor:
        groups = logits.view_as(kept).masked_fill(~kept, -torch.inf)
        return torch.where(kept, groups.softmax(1), 0.0)

    return (shares(returns / beta + log_ratios) - shares(log_ratios)).flatten()


def _centred(returns: Tensor, valid: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Return [prompts, samples] distances from the group's mean, and [prompts, 1] its size."""
    groups = torch.where(valid, returns, 0.0).view(-1, samples_per_prompt)
    kept = valid.view_as(groups)
    count = kept.sum(1, keepdim=True)
    mean = groups.sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(kept, groups - mean, 0.0), count


def returns_to_go(
    rewards: Tensor,
    actions: MacroActions,
    *,
    baselines: Tensor | None = None,
    value_rule: ValueRule,
    macro_reward: MacroReward,
    gamma: float,
    discount: StepUnit,
) -> Tensor:
    """Discounted sum of the rewards from each macro action on, minus a baseline.

    G_k = R_k + gamma G_{k+1}. Whitened over the tokens of the batch, with actions of one token, it
    is REINFORCE++ (arXiv 2501.03262). With the score of the greedy response to the same prompt as
    the baseline it is ReMax (arXiv 2310.10505), algorithm 2; the KL penalty is part of the rewards
    to go, as in verl, where the authors' code has each token's own.

    Args:
        rewards: shape of actions.ids, token rewards; padding is ignored.
        actions: segmentation, padded or packed.
        baselines: [batch], or None for 0.
        value_rule: as in `macro_advantages`; weights rewards if `macro_reward` is "mean".
        macro_reward: as in `macro_advantages`.
        gamma: discount in [0, 1].
        discount: as in `macro_advantages`.

    Returns:
        [batch, macro] advantages, 0 on padding.
    """
    found = macro_advantages(
        rewards,
        torch.zeros_like(rewards),
        actions,
        value_rule=value_rule,
        macro_reward=macro_reward,
        gamma=gamma,
        gae_lambda=1.0,
        discount=discount,
    ).advantages
    if baselines is None:
        return found
    return torch.where(actions.lengths > 0, found - baselines[:, None], 0.0)
