"""From raw scores to what the last token is rewarded with, as the `reward` section says."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm import shaping
from marlhf_mega.algorithm.masked import masked_moments, mean_and_variance
from marlhf_mega.algorithm.rewards import RunningMoments, handle_missing_eos, shape_scores
from marlhf_mega.config.sections.reward import RewardConfig
from marlhf_mega.rewards.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What shaping knows of the responses besides their scores."""

    lengths: Tensor
    """[batch] tokens."""
    finished: Tensor
    """[batch] bool: they end with an end token."""
    references: Tensor | None = None
    """[batch, count] scores of other responses to the prompts, NaN where there are fewer."""


class Shaper:
    """Shapes scores; keeps the moments of all scores of the run.

    First the functions of `reward.shaping`, then normalisation and clip. Truncated responses come
    after them, so that their penalty is in the units that the policy is trained on and is never
    clipped; constraints come last.
    """

    def __init__(
        self, config: RewardConfig, *, longest: int, sum_over_data: Callable[[Tensor], Tensor]
    ) -> None:
        """Start without a history.

        Args:
            config: the `reward` section.
            longest: the limit of a response.
            sum_over_data: sums a vector over the data-parallel ranks.
        """
        self.config, self.longest, self.sum_over_data = config, longest, sum_over_data
        self.moments = RunningMoments()
        """Of all valid scores before normalisation."""
        self._batch_moments = torch.zeros(3, dtype=torch.float64)

    def shape(self, scores: Scores, answers: Answers, *, is_baseline: bool = False) -> Tensor:
        """Shape this rank's part of a batch. All ranks call it.

        Args:
            scores: of the batch.
            answers: of the batch.
            is_baseline: take the moments of the batch before, and leave them as they are.

        Returns:
            [batch] float32, 0 where not valid.
        """
        config, shaped = self.config, scores.scores
        for name in config.shaping:
            match name:
                case "par":
                    assert answers.references is not None
                    shaped = shaping.par(shaped, answers.references, scale=config.par_scale)
                case "center_reference":
                    assert answers.references is not None
                    shaped = shaping.center_reference(shaped, answers.references)
                case "length_penalty":
                    coef, limit = config.length_coef, config.length_limit
                    shaped = shaping.length_penalty(shaped, answers.lengths, coef=coef, limit=limit)
                case "overlong":
                    shaped = shaping.overlong(
                        shaped,
                        answers.lengths,
                        longest=self.longest,
                        buffer=config.overlong_buffer or max(self.longest // 5, 1),
                        factor=config.overlong_factor,
                    )
                case "z_score":
                    if not is_baseline:
                        own = masked_moments(shaped, scores.valid)
                        self._batch_moments = self.sum_over_data(own)
                    mean, variance = mean_and_variance(self._batch_moments)
                    shaped = shaping.z_score(shaped, mean=mean, variance=variance)
        if not is_baseline:
            own = masked_moments(shaped, scores.valid)
            self.moments = self.moments.update(self.sum_over_data(own))
        shaped = shape_scores(shaped, self.moments, normalize=config.normalize, clip=config.clip)
        penalty = config.missing_eos_penalty
        value = -penalty if config.missing_eos == "replace" else penalty
        shaped = handle_missing_eos(shaped, answers.finished, mode=config.missing_eos, value=value)
        if scores.holds is not None:
            shaped = shaping.constrained(shaped, scores.holds)
        return torch.where(scores.valid, shaped, 0.0)
