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
    ref_logprobs: Tensor
    """[batch, response] of the reference."""
    old_values: Tensor
    """[batch, response] of the critic at rollout."""
    advantages: Tensor
    """[batch, response] of the token's macro action; whitened and weighted if asked for."""
    returns: Tensor
    """[batch, response] of the token's macro action."""
