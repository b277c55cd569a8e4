"""Samples that cannot be learned from are left out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.macro_actions import NO_ACTION, MacroActions
from marlhf_mega.rewards.scores import Scores


def without_non_finite(scores: Scores, grids: Sequence[Tensor]) -> Scores:
    """Leave out samples of which a log-prob or value is not finite, and zero these.

    One of them would make the moments of the whole batch, and so every advantage, NaN.

    Args:
        scores: of the batch.
        grids: [batch, response] each, zero on padding; changed in place.
    """
    finite = torch.stack([grid.isfinite().all(1) for grid in grids]).all(0)
    for grid in grids:
        grid.masked_fill_(~finite[:, None], 0.0)
    lost = scores.valid & ~finite
    errors = ["a log-prob or a value is not finite"] * int(lost.sum())
    return scores._replace(valid=scores.valid & finite, errors=[*scores.errors, *errors])


def without_unknown(
    scores: Scores, actions: MacroActions, values: Tensor
) -> tuple[Scores, MacroActions, Tensor]:
    """Leave out samples with a macro action that starts from where nothing had a score."""
    lost = values.isnan().any(1)
    errors = [*scores.errors, *["no continuation has a score"] * int(lost.sum())]
    kept = MacroActions.from_ids(actions.ids.masked_fill(lost[:, None], NO_ACTION))
    values = values.masked_fill(lost[:, None], 0.0)[:, : kept.lengths.size(1)]
    return scores._replace(valid=scores.valid & ~lost, errors=errors), kept, values
