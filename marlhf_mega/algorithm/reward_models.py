"""What is learned from preference pairs besides the loss of `losses.preference_loss`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_labels(labels: Tensor, lead: Tensor, *, rate: float) -> Tensor:
    """Move soft labels towards what a reward model says (iterative data smoothing).

    p <- (1 - rate) p + rate sigma(D), after each epoch, with the model that the epoch has trained.
    The idea is that of Zhu et al. 2024, arXiv 2401.16335; this form of the update has not been
    verified against the paper, nor is a rate known to us.

    Args:
        labels: [pairs], the probabilities that the chosen responses are the better ones.
        lead: [pairs], D: score of the chosen response minus that of the rejected one.
        rate: from 0, labels stay, to 1, labels are what the model says.
    """
    return (1 - rate) * labels + rate * lead.sigmoid()


def odin_penalty(lengths: Tensor, quality: Tensor, length_scores: Tensor) -> Tensor:
    """Keep length out of one score and in the other (ODIN, Chen et al. 2024, arXiv 2402.07319).

    1 - corr(n, L) + |corr(n, Q)|, beside the loss of the pairs on the sum Q + L and
    `head_overlap`. Only Q is a reward afterwards. The released code also adds |corr(n, Q + L)|, and
    centres and normalises the weights of both heads while they are trained but not when Q is used;
    neither is done here.

    Args:
        lengths: [sequences], tokens of each sequence of the whole batch, chosen and rejected.
        quality: [sequences], Q: scores by the head that is to ignore the length.
        length_scores: [sequences], L: scores by the other head.
    """
    return 1 - correlation(lengths, length_scores) + correlation(lengths, quality).abs()


def head_overlap(quality_weight: Tensor, length_weight: Tensor) -> Tensor:
    """Return |cos| of two heads' weights, 0 if they are orthogonal (ODIN, arXiv 2402.07319)."""
    return F.cosine_similarity(quality_weight.flatten(), length_weight.flatten(), dim=0).abs()


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors, 0 where one of them does not vary."""
    one, other = one - one.mean(), other - other.mean()
    norm = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return (one @ other) / norm if norm > 0 else 0 * (one @ other)


def attend_pairs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Sum up what a user has preferred: self-attention over the user's pairs, and its mean (VPL).

    Args:
        query: [users, pairs, size].
        key: [users, pairs, size].
        value: [users, pairs, size].
        mask: bool [users, pairs], True on real pairs, of which every user has one at least.

    Returns:
        [users, size].
    """
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    kept = mask[..., None].to(value.dtype)
    return (weights @ value * kept).sum(1) / kept.sum(1)


def draw_latent(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Return z = mean + exp(log_variance / 2) noise, scaled to the norm sqrt(latent) (VPL).

    Poddar et al. 2024, arXiv 2408.10075, and its released code, which takes the mean itself, at its
    own length, outside of training.

    Args:
        mean: [users, latent].
        log_variance: [users, latent].
        noise: [users, latent], standard normal.
    """
    drawn = mean + (log_variance / 2).exp() * noise
    return F.normalize(drawn, dim=-1) * math.sqrt(drawn.shape[-1])


def latent_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over the latent: [users]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2


def annealed(step: int, *, cycle: int) -> float:
    """Return the factor of the KL term in a step: a cyclic half cosine from 0.1 to 1 (VPL).

    0.1 + 0.9 (1 - cos(pi t / cycle)) / 2 with t = step mod cycle.

    Args:
        step: number of optimizer steps before this one.
        cycle: steps of a rise, after which the factor falls back; 0 means 1 throughout.
    """
    if cycle == 0:
        return 1.0
    return 0.1 + 0.9 * (1 - math.cos(math.pi * (step % cycle) / cycle)) / 2
