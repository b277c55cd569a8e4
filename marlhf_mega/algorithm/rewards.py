"""From reward-model scores and log-probs to token rewards; KL estimators, shaping, KL control."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "abs", "k3_straight_through"]
MissingEos = Literal["none", "subtract", "replace"]
Normalize = Literal["none", "running", "running_scale"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy.

    With d = logprobs - ref_logprobs: k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d| (Schulman 2020).
    k1 suits the reward (unbiased, but without a gradient in expectation), k2 and
    k3_straight_through (value of k3, gradient of k2) suit the loss.

    Args:
        logprobs: any shape, float.
        ref_logprobs: same shape.
        estimator: see above.
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return _k3(difference)
        case "k3_straight_through":
            k2 = 0.5 * difference.square()
            return k2 + (_k3(difference) - k2).detach()


def _k3(difference: Tensor) -> Tensor:
    """One bad token must not overflow: the exponent is clamped to 20, the estimate to 10."""
    return ((-difference).clamp(-20, 20).exp() - 1 + difference).clamp(-10, 10)


def last_token_positions(response_mask: Tensor) -> Tensor:
    """Flat index of every row's last real token in [batch, response]; -1 for an empty row.

    For packed tokens the same is `cu_seqlens[1:] - 1`.
    """
    lengths = response_mask.sum(1)
    firsts = torch.arange(lengths.numel(), device=lengths.device) * response_mask.size(1)
    return torch.where(lengths > 0, firsts + lengths - 1, -1)


def token_rewards(
    kl: Tensor,
    scores: Tensor,
    score_positions: Tensor,
    *,
    kl_coef: float,
    score_clip: float | None = None,
) -> Tensor:
    """Penalise KL on every token and add the (clipped) score on the last one.

    Args:
        kl: [batch, response] or packed [tokens], from `kl_estimate`; 0 on padding.
        scores: [batch] one shaped score per response.
        score_positions: [batch] int64 flat index into kl; -1 drops the score.
        kl_coef: weight of the penalty.
        score_clip: scores are clipped to +- this; None is no clipping.
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    placed = torch.where(score_positions >= 0, scores, 0.0).to(kl.dtype)
    rewards = (kl.flatten() * -kl_coef).index_add(0, score_positions.clamp(min=0), placed)
    return rewards.view_as(kl)


def handle_missing_eos(
    scores: Tensor, ends_with_eos: Tensor, *, mode: MissingEos, value: float
) -> Tensor:
    """Treat scores [batch] of responses cut off before EOS (ends_with_eos [batch] bool False).

    none: as they are; subtract: minus `value`; replace: `value` instead of the score.
    """
    match mode:
        case "none":
            return scores
        case "subtract":
            return torch.where(ends_with_eos, scores, scores - value)
        case "replace":
            return torch.where(ends_with_eos, scores, value)


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979), as plain numbers."""

    count: float = 0.0
    mean: float = 0.0
    square_deviation: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, moments: Tensor) -> "RunningMoments":
        """Take in a batch given by its (reduced) `masked.masked_moments`."""
        total, square_total, batch_count = moments.tolist()
        if not batch_count:
            return self
        count = self.count + batch_count
        shift = total / batch_count - self.mean
        batch_deviation = max(square_total - total * total / batch_count, 0.0)
        return RunningMoments(
            count=count,
            mean=self.mean + shift * batch_count / count,
            square_deviation=self.square_deviation
            + batch_deviation
            + shift * shift * self.count * batch_count / count,
        )

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 as long as nothing varies."""
        variance = self.square_deviation / max(self.count - 1, 1)
        return variance**0.5 if variance > 0 else 1.0


def shape_scores(
    scores: Tensor,
    moments: RunningMoments,
    *,
    normalize: Normalize,
    reference_scores: Tensor | float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """Subtract a reference, normalise by history, clip (PPO-max, arXiv 2307.04964).

    Args:
        scores: [batch] float.
        moments: history of scores - reference_scores, this batch included or not as the caller
            wants it.
        normalize: "running" subtracts the mean and divides by the standard deviation,
            "running_scale" only divides.
        reference_scores: [batch] score of a reference response to the same prompt, or a constant.
        clip: bound on the absolute value of the result; None is no clipping.
    """
    shaped = scores - reference_scores
    if normalize == "running":
        shaped = shaped - moments.mean
    if normalize != "none":
        shaped = shaped / moments.std
    return shaped if clip is None else shaped.clamp(-clip, clip)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float, *, target: float, horizon: float, num_samples: int
) -> float:
    """Steer the KL coefficient: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl_coef: current coefficient.
        observed_kl: mean over responses of the KL summed over tokens; NaN changes nothing.
        target: the KL per response it steers to.
        horizon: samples over which it reacts.
        num_samples: responses in this step.
    """
    if math.isnan(observed_kl):
        return kl_coef
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
