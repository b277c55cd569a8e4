"""Turns scores and log-probs into token rewards: KL estimators, score shaping, KL control."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import (
    LossKl,
    MissingEos,
    RewardKl,
    ScoreNormalization,
    check_choice,
)
from marlhf_mega.algorithm.macro_actions import MacroActions


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: RewardKl | LossKl) -> Tensor:
    """Estimate KL(policy || reference) per token from samples of the policy.

    With d = logprobs - ref_logprobs: k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d| (Schulman 2020).
    k1 suits the reward (unbiased, but without a gradient in expectation), k2 and
    k3_straight_through (value of k3, gradient of k2) suit the loss.

    Args:
        logprobs: any shape, float.
        ref_logprobs: same shape.
        estimator: see above.
    """
    check_choice("estimator", estimator, RewardKl, LossKl)
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
    """Clamp the exponent to 20 and the estimate to 10, so that no single token overflows."""
    return ((-difference).clamp(-20, 20).exp() - 1 + difference).clamp(-10, 10)


def last_token_positions(response_mask: Tensor) -> Tensor:
    """Flat index in [batch, response] of each response's last token; -1 if it is empty.

    For packed tokens this is `cu_seqlens[1:] - 1`.
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
    """Penalise the KL of every token and add the (clipped) score at the last one.

    Args:
        kl: [batch, response] or packed [tokens], from `kl_estimate`; 0 on padding.
        scores: [batch] one shaped score per response.
        score_positions: [batch] int64 flat index into kl; -1 drops the score.
        kl_coef: weight of the penalty.
        score_clip: scores are clipped to +- this; None means no clipping.
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    placed = torch.where(score_positions >= 0, scores, 0.0).to(kl.dtype)
    rewards = (kl.flatten() * -kl_coef).index_add(0, score_positions.clamp(min=0), placed)
    return rewards.view_as(kl)


def log_ratio_rewards(
    dpo_logprobs: Tensor, ref_logprobs: Tensor, *, weight: float, clip: float | None = None
) -> Tensor:
    """Reward every token by what DPO has learned: clip(weight (log pi_dpo - log pi_ref), +- clip).

    RTO (arXiv 2404.18922), as in the authors' code, which has weight 0.05 and clip 0.05; pi_ref is
    the model that DPO started from, and the reward of the response comes on top.

    Args:
        dpo_logprobs: [batch, response].
        ref_logprobs: the same shape.
        weight: beta_1 of the paper.
        clip: None means no clipping.
    """
    rewards = weight * (dpo_logprobs - ref_logprobs)
    return rewards if clip is None else rewards.clamp(-clip, clip)


def segment_rewards(
    scores: Tensor, actions: MacroActions, *, weight: float, clip: float | None = None
) -> Tensor:
    """Reward the last token of every segment by the score there.

    Fine-Grained RLHF (arXiv 2306.01693), for one of its reward models; several add up. The authors'
    models classify the segment and pay +- a constant; here a reward model's score of the response
    so far is paid, times a weight.

    Args:
        scores: [batch, response] after each token.
        actions: the segments.
        weight: of this model.
        clip: bound of the weighted score; None means no clipping.
    """
    following = torch.nn.functional.pad(actions.ids[:, 1:], (0, 1), value=-1)
    ends = (actions.ids >= 0) & (actions.ids != following)
    rewards = torch.where(ends, weight * scores, 0.0)
    return rewards if clip is None else rewards.clamp(-clip, clip)


def handle_missing_eos(
    scores: Tensor, ends_with_eos: Tensor, *, mode: MissingEos, value: float
) -> Tensor:
    """Adjust the scores of responses that do not end with EOS.

    Args:
        scores: [batch].
        ends_with_eos: [batch] bool.
        mode: "none" keeps their scores, "subtract" subtracts `value`, "replace" puts `value`.
        value: see mode.
    """
    check_choice("mode", mode, MissingEos)
    match mode:
        case "none":
            return scores
        case "subtract":
            return torch.where(ends_with_eos, scores, scores - value)
        case "replace":
            return torch.where(ends_with_eos, scores, value)


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979), as Python numbers."""

    count: float = 0.0
    mean: float = 0.0
    square_deviation: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, moments: Tensor) -> "RunningMoments":
        """Add a batch, given by its (reduced) `masked_moments`."""
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
        """Unbiased standard deviation; 1 as long as all scores are equal."""
        variance = self.square_deviation / max(self.count - 1, 1)
        return variance**0.5 if variance > 0 else 1.0


def shape_scores(
    scores: Tensor,
    moments: RunningMoments,
    *,
    normalize: ScoreNormalization,
    clip: float | None = None,
) -> Tensor:
    """Normalise by the history of scores, then clip (PPO-max, arXiv 2307.04964).

    Args:
        scores: [batch] float.
        moments: of the scores so far, with or without this batch.
        normalize: "running" subtracts the mean and divides by the standard deviation,
            "running_scale" only divides.
        clip: bound on the absolute value of the result; None means no clipping.
    """
    check_choice("normalize", normalize, ScoreNormalization)
    shaped = scores - moments.mean if normalize == "running" else scores
    if normalize != "none":
        shaped = shaped / moments.std
    return shaped if clip is None else shaped.clamp(-clip, clip)


def adaptive_kl_coef(
    kl_coef: float, observed_kl: float, *, target: float, horizon: float, num_samples: int
) -> float:
    """Adapt the KL coefficient: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl_coef: current coefficient.
        observed_kl: mean over responses of the KL summed over tokens; NaN keeps the coefficient.
        target: KL per response to steer to.
        horizon: responses over which the coefficient reacts.
        num_samples: responses in this step.
    """
    if math.isnan(observed_kl):
        return kl_coef
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
