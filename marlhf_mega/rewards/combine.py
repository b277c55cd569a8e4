"""Combine the scores of several sources to one score per response."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.shaping import maxmin, robust
from marlhf_mega.config.sections.reward import RewardConfig
from marlhf_mega.rewards.scores import Scores


def combine(
    parts: Sequence[Scores], config: RewardConfig, *, sum_over_data: Callable[[Tensor], Tensor]
) -> Scores:
    """Combine the sources' scores as `reward.combine` says; valid where all sources are.

    Args:
        parts: scores of the same batch by every source; at least one.
        config: the `reward` section.
        sum_over_data: sums a vector over the data-parallel ranks.
    """
    weights = [term.weight for term in config.source]
    scores = torch.stack([w * part.scores for w, part in zip(weights, parts, strict=True)])
    valid = torch.stack([part.valid for part in parts]).all(0)
    match config.combine:
        case "sum":
            total = scores.sum(0)
        case "robust":
            total = robust(scores, mean_weight=config.robust_weight)
        case "maxmin":
            sums = torch.where(valid, scores, 0.0).double().sum(1)
            *totals, count = sum_over_data(torch.cat((sums, valid.double().sum()[None])))
            total = maxmin(scores, torch.stack(totals) / count.clamp(min=1))
    errors = [error for part in parts for error in part.errors]
    finite = total.isfinite()
    errors += ["the weighted sum of the scores is too large"] * int((valid & ~finite).sum())
    valid &= finite
    return Scores(torch.where(valid, total, 0.0), valid, errors)


def constrain(scores: Scores, judged: Sequence[tuple[float, Scores]]) -> Scores:
    """Note which samples satisfy all constraints; one that a judge failed on has no score.

    Args:
        scores: of the sources.
        judged: threshold and scores of every constraint.
    """
    if not judged:
        return scores
    valid = torch.stack([scores.valid, *(part.valid for _, part in judged)]).all(0)
    holds = torch.stack([part.scores >= threshold for threshold, part in judged]).all(0)
    errors = [*scores.errors, *(error for _, part in judged for error in part.errors)]
    return Scores(torch.where(valid, scores.scores, 0.0), valid, errors, holds)


def check_enough_valid(
    scores: Scores, *, max_invalid_fraction: float, sum_over_data: Callable[[Tensor], Tensor]
) -> None:
    """Stop the run if too many samples of a step have no score: all ranks, or none of them.

    Args:
        scores: of this replica; the message shows the most common of its reasons.
        max_invalid_fraction: the config's limit.
        sum_over_data: sums a vector over the replicas.

    Raises:
        RuntimeError: the limit is exceeded.
    """
    counts = torch.stack((scores.valid, torch.ones_like(scores.valid))).double().sum(1)
    num_valid, num_samples = map(int, sum_over_data(counts).tolist())
    num_invalid = num_samples - num_valid
    if num_invalid <= max_invalid_fraction * num_samples:
        return
    commonest = Counter(scores.errors).most_common(1)
    reason = f", most often: {commonest[0][0]}" if commonest else ""
    raise RuntimeError(
        f"reward.max_invalid_fraction={max_invalid_fraction:g}: at most this fraction of a "
        f"step's samples may fail; {num_invalid} of {num_samples} have no score{reason}. Fix "
        "reward.source."
    )
