"""What every reward source returns."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

NO_SCORE = float("nan")
"""The score of a sample without one, where scores are written or averaged."""


class Scores(NamedTuple):
    """The scores of a batch."""

    scores: Tensor
    """[batch] float32, always finite; 0 where not valid."""
    valid: Tensor
    """[batch] bool; False means that the sample has no score and is masked."""
    errors: list[str]
    """One short reason for every sample without a score."""
    holds: Tensor | None = None
    """[batch] bool, whether all of `reward.constraints` hold; None without any."""


def other_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a data row besides those that a source gets under the same names."""
    return {name: value for name, value in row.items() if name not in ("prompt", "response")}
