"""What a pass of the decoder adds: whole prompts, or one token to each sequence."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Distinct new prompts, right-padded, for neighbouring slots that may share them."""

    tokens: Tensor
    """[batch, seq] int64."""
    rows: Tensor
    """[slots] int64: the row of `tokens` that each new slot answers."""
    lengths: Tensor
    """[slots] int64: of each slot's prompt."""
    first_slot: int


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One more token for the first slots."""

    tokens: Tensor
    """[batch, 1] int64."""
    positions: Tensor
    """[batch] int64: where the tokens stand, which is how many the cache holds."""
    longest: int
    """Highest position plus one, or more."""


Work = Prefill | Decode
