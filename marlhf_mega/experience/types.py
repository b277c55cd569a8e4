"""The experience record: all that the update needs to know about one rollout batch."""

from dataclasses import dataclass

from torch import Tensor

from marlhf_mega.algorithm.macro_actions import MacroActions


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One data-parallel rank's samples, the same on every rank of the replica."""

    prompts: list[list[int]]
    """Token ids."""
    responses: list[list[int]]
    """Token ids."""
    actions: MacroActions
    """ids [batch, response]; -1 throughout a sample without a score, which takes no part."""
    old_logprobs: Tensor
    """[batch, response] of the policy at rollout, by the trainer or the sampler."""
    ref_logprobs: Tensor | None
    """[batch, response] of the reference; None without one."""
    old_values: Tensor | None
    """[batch, response] of the critic at rollout; None without a critic."""
    advantages: Tensor
    """[batch, response]; whitened and weighted if asked for."""
    returns: Tensor | None
    """[batch, response] targets of the critic; None without one."""
    learned: MacroActions | None = None
    """Those tokens of `actions` that the policy learns from; None means all."""
    kept: Tensor | None = None
    """[batch, response, width] on the CPU: what the sampler's filters kept, see `Rollout`."""
    routing: Tensor | None = None
    """[batch, tokens, layers, top_k] on the CPU: the sampler's experts, see `Rollout`."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """What an experience was made of: nothing that the update needs, but what people look at."""

    scores: Tensor
    """[batch] raw, NaN where there is none."""
    shaped: Tensor
    """[batch] reward of the last token: the score after normalising, clipping and the penalty for
    a missing end; without the KL penalty. 0 where there is no score."""
    kl: Tensor | None
    """[batch, response] log of policy over reference, as `policy/kl` sums it; 0 on padding. None
    without a reference."""
    values: Tensor | None
    """[batch, macro] the critic's values, pooled over the macro actions, or those of `vine`; None
    with neither."""
