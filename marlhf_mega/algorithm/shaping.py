"""From the scores of several sources to what rewards the last token.

A function for each name of `Combination` and `Shaping`, and for constraints.
"""

import torch
from torch import Tensor


def robust(scores: Tensor, *, mean_weight: float) -> Tensor:
    """Weigh the mean over an ensemble against its minimum: a mean_k r_k + (1 - a) min_k r_k.

    Reward-robust RLHF (arXiv 2409.15360). Its nominal reward may be that of another head than the
    mean, and its a is not known to us. With a = 0 this is the minimum for each sample, which the
    released code of MaxMin-RLHF takes.

    Args:
        scores: [sources, batch].
        mean_weight: a.
    """
    return mean_weight * scores.mean(0) + (1 - mean_weight) * scores.amin(0)


def maxmin(scores: Tensor, means: Tensor) -> Tensor:
    """Take the scores of the user group that fares worst: r_u, u = argmin_u E[r_u].

    MaxMin-RLHF (arXiv 2402.08925), whose policy maximises the smallest of the groups' expected
    rewards; the expectation is a mean over the batch. The first of equals is taken. The released
    code takes the minimum for each sample instead, see `robust`.

    Args:
        scores: [sources, batch], a source for each group.
        means: [sources] of the global batch.
    """
    return scores[means.argmin()]


def par(scores: Tensor, references: Tensor, *, scale: float = 1.0) -> Tensor:
    """Bound scores, centred on those of reference responses: mean_m sigmoid(scale (r - r_m)).

    Preference as reward (arXiv 2502.18770), as in the authors' code: the references are responses
    of the SFT model to the same prompt, of which one is enough.

    Args:
        scores: [batch].
        references: [batch, count], NaN where a sample has fewer.
        scale: k of the paper's code.

    Returns:
        [batch]; NaN for a sample without any reference.
    """
    return torch.sigmoid(scale * (scores[:, None] - references)).nanmean(1)


def center_reference(scores: Tensor, references: Tensor) -> Tensor:
    """Calibrate scores across prompts: sigmoid(r - mean_m r_m).

    CGPO (arXiv 2409.20370), whose reference is the response of the data set; the formula is that of
    an implementation in TRL (pull request 2190, not merged). With one reference this is `par` of
    scale 1.

    Args:
        scores: [batch].
        references: [batch, count], NaN where a sample has fewer.
    """
    return torch.sigmoid(scores - references.nanmean(1))


def length_penalty(scores: Tensor, lengths: Tensor, *, coef: float, limit: int) -> Tensor:
    """Subtract coef * max(length - limit, 0), as the code of PAR (arXiv 2502.18770) may do.

    Args:
        scores: [batch].
        lengths: [batch] tokens of the responses.
        coef: penalty of a token.
        limit: tokens without a penalty.
    """
    return scores - coef * (lengths - limit).clamp(min=0)


def overlong(
    scores: Tensor, lengths: Tensor, *, longest: int, buffer: int, factor: float = 1.0
) -> Tensor:
    """Punish the last tokens before the limit: min(0, (longest - buffer - length) / buffer) factor.

    DAPO (arXiv 2503.14476), soft overlong punishment, without its case beyond the limit, where
    generation stops.

    Args:
        scores: [batch].
        lengths: [batch] tokens of the responses.
        longest: the limit of a response.
        buffer: tokens before the limit over which the penalty grows.
        factor: penalty at the limit.
    """
    return scores + factor * ((longest - buffer - lengths) / buffer).clamp(max=0)


def z_score(scores: Tensor, *, mean: Tensor, variance: Tensor) -> Tensor:
    """Standardise by the moments of the batch, as `meanstd` of arXiv 2502.18770 by running ones.

    Args:
        scores: [batch].
        mean: scalar of the global batch.
        variance: scalar of the global batch, unbiased.
    """
    return ((scores - mean) * torch.rsqrt(variance + 1e-8)).to(scores.dtype)


def within_kl(scores: Tensor, kl: Tensor, *, longest: float) -> Tensor:
    """Let a score shrink to 0 as the policy leaves the reference: r max(1 - kl / longest, 0).

    CGPO (arXiv 2409.20370), objectives CRPG and CRRAFT, as in an implementation in TRL (pull
    request 2190, not merged).

    Args:
        scores: [batch], not negative.
        kl: [batch] log of policy over reference of the whole response, in nats.
        longest: nats from which on nothing is left.
    """
    return scores * (1 - kl / longest).clamp(min=0)


def constrained(scores: Tensor, holds: Tensor) -> Tensor:
    """Let violations earn nothing: J r, or r itself where it is negative.

    CGPO (arXiv 2409.20370), objective CRPG, verified in an implementation in TRL (pull request
    2190, not merged), not in the paper itself. There the reward is
    J sigmoid(r - r_0) max(1 - kl / kl_max, 0) less its batch mean, J = 1 where all judges agree: a
    violation has 0, which the mean makes a punishment. Here the sigmoid is `center_reference`, the
    mean is up to the estimator, and the last factor is `within_kl`.

    Args:
        scores: [batch] shaped.
        holds: [batch] bool, J.
    """
    return torch.where(holds, scores, scores.clamp(max=0))


def without_praise(advantages: Tensor, holds: Tensor) -> Tensor:
    """Make no violation likelier: clamp their advantages to 0, after whitening.

    Ours, for estimators whose baseline a violation may exceed; CGPO (arXiv 2409.20370) has only
    `constrained`.

    Args:
        advantages: [batch, response].
        holds: [batch] bool.
    """
    return torch.where(holds[:, None], advantages, advantages.clamp(max=0))
