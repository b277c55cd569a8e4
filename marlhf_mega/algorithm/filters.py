"""Which samples of a rollout are trained on, by their scores: `rollout.filter`.

All take the scores of the whole rollout batch, of all data-parallel ranks: [batch], the responses
to a prompt adjacent, and which of them are valid. They return indices into it, in the order of the
prompts; one that comes twice is trained on twice. Samples without a score come only where a prompt
has too few others, and take no part there.
"""

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, uniform

_FILTER_STREAM = 4
"""Keeps these draws apart from others with the same seed."""


def power_probabilities(scores: Tensor, valid: Tensor, *, power: float) -> Tensor:
    """Return [batch] float64 p_i = |score_i|^power / sum_j |score_j|^power; 0 where not valid.

    Of nothing but zeros all valid samples have the same, and all samples if none is valid.
    """
    weights = torch.where(valid, scores, 0.0).double().abs() ** power
    if not weights.any():
        weights = (valid if valid.any() else torch.ones_like(valid)).double()
    return weights / weights.sum()


def power_resample(scores: Tensor, valid: Tensor, *, power: float, seed: int, step: int) -> Tensor:
    """Draw as many samples with replacement, by `power_probabilities`.

    PF-PPO (arXiv 2409.06957) as in verl, which has power 2 and draws after advantages are whitened;
    here advantages are estimated and whitened over what is drawn. Draw i is a function of (seed,
    step, i).

    Returns:
        [batch] int64.
    """
    cumulated = power_probabilities(scores, valid, power=power).cumsum(0)
    places = torch.arange(len(scores), device=scores.device)
    draws = uniform(fold(seed, step, _FILTER_STREAM, places)) * cumulated[-1]
    # A draw may round up to the whole: it belongs to the last sample that can be drawn.
    last = torch.searchsorted(cumulated, cumulated[-1])
    return torch.searchsorted(cumulated, draws, right=True).clamp(max=last)


def best_worst(scores: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Keep the best and the worst response to each prompt.

    PF-PPO (arXiv 2409.06957), best-worst filter, over each prompt's own responses: over the whole
    batch, as verl has it, two different samples would be left.

    Returns:
        [2 * prompts] int64: of each prompt the best, then the worst.
    """
    order, count = _ranked(scores, valid, samples_per_prompt)
    return torch.cat([order[:, :1], order.gather(1, (count - 1).clamp(min=1))], 1).flatten()


def best_random(
    scores: Tensor, valid: Tensor, *, samples_per_prompt: int, seed: int, step: int
) -> Tensor:
    """Keep the best response to each prompt and one of the others.

    PF-PPO (arXiv 2409.06957), best-random filter, over each prompt's own responses. The draw for a
    prompt is a function of (seed, step, its number in the batch).

    Returns:
        [2 * prompts] int64: of each prompt the best, then the other.
    """
    order, count = _ranked(scores, valid, samples_per_prompt)
    numbers = torch.arange(len(order), device=scores.device)
    draws = uniform(fold(seed, step, _FILTER_STREAM, numbers))[:, None]
    others = 1 + (draws * (count - 1).clamp(min=1)).long()
    return torch.cat([order[:, :1], order.gather(1, others)], 1).flatten()


def best_of_n(scores: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Keep the best response to each prompt, as RAFT (arXiv 2304.06767) does; [prompts] int64."""
    return _ranked(scores, valid, samples_per_prompt)[0][:, 0]


def has_spread(scores: Tensor, valid: Tensor, *, samples_per_prompt: int) -> Tensor:
    """Return [prompts] bool: whether the scores of a prompt's responses differ.

    Dynamic sampling of DAPO (arXiv 2503.14476), section 3.2, with scores in place of accuracy.
    """
    groups, kept = (values.view(-1, samples_per_prompt) for values in (scores, valid))
    highest = torch.where(kept, groups, -torch.inf).amax(1)
    return highest > torch.where(kept, groups, torch.inf).amin(1)


def _ranked(scores: Tensor, valid: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Return [prompts, samples] indices, the best first, and [prompts, 1] how many are valid."""
    kept = valid.view(-1, samples_per_prompt)
    groups = torch.where(kept, scores.view_as(kept), -torch.inf)
    order = groups.argsort(stable=True, dim=1, descending=True)
    firsts = torch.arange(0, len(scores), samples_per_prompt, device=scores.device)
    return firsts[:, None] + order, kept.sum(1, keepdim=True)
