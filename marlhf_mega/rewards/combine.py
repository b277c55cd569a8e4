"""From several sources' scores to the one score of each response."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.masked import masked_moments
from marlhf_mega.algorithm.rewards import RunningMoments, handle_missing_eos, shape_scores
from marlhf_mega.config.schema import RewardConfig
from marlhf_mega.rewards.rule import Scores


def weighted_sum(parts: Sequence[tuple[float, Scores]]) -> Scores:
    """Add the sources' scores by weight; a response counts if every source has scored it.

    Args:
        parts: (weight, scores of the same batch) of each source; at least one.
    """
    total = torch.stack([weight * part.scores for weight, part in parts]).sum(0)
    valid = torch.stack([part.valid for _, part in parts]).all(0)
    errors = [error for _, part in parts for error in part.errors]
    return Scores(torch.where(valid, total, 0.0), valid, errors)


def shape(
    scores: Scores,
    ends_with_eos: Tensor,
    *,
    config: RewardConfig,
    moments: RunningMoments,
    sum_over_data: Callable[[Tensor], Tensor],
) -> tuple[Tensor, RunningMoments]:
    """Normalise by all scores so far, clip, then treat responses that were cut off.

    The treatment comes last, so that its value is in the units the policy is trained on and is
    never clipped away. One collective, whatever the config says.

    Args:
        scores: this rank's part of the batch.
        ends_with_eos: [batch] bool.
        config: the `reward` section.
        moments: of every valid score of the run before this batch.
        sum_over_data: adds a vector over the data-parallel ranks.

    Returns:
        [batch] float32, 0 where not valid; and the moments with this batch in.
    """
    moments = moments.update(sum_over_data(masked_moments(scores.scores, scores.valid)))
    shaped = shape_scores(scores.scores, moments, normalize=config.normalize, clip=config.clip)
    penalty = config.missing_eos_penalty
    value = -penalty if config.missing_eos == "replace" else penalty
    shaped = handle_missing_eos(shaped, ends_with_eos, mode=config.missing_eos, value=value)
    return torch.where(scores.valid, shaped, 0.0), moments


def check_enough_valid(
    *, num_invalid: int, num_samples: int, max_invalid_fraction: float, errors: Sequence[str]
) -> None:
    """Stop the run if too many samples of a step have no score.

    Every rank calls it with the counts of the global batch, so that all stop or none does.

    Args:
        num_invalid: samples without a score, over all ranks.
        num_samples: samples of the step, over all ranks.
        max_invalid_fraction: the config's limit.
        errors: this rank's reasons; the commonest is shown.

    Raises:
        RuntimeError: the limit is exceeded.
    """
    if num_invalid <= max_invalid_fraction * num_samples:
        return
    commonest = Counter(errors).most_common(1)
    reason = f", most often: {commonest[0][0]}" if commonest else ""
    raise RuntimeError(
        f"reward.max_invalid_fraction={max_invalid_fraction:g}: no more samples of a step than "
        f"this may fail; {num_invalid} of {num_samples} have no score{reason}. Mend reward.source."
    )
