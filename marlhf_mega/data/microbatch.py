"""Split a rank's sequences into microbatches of similar lengths.

A split is a list of int64 vectors of indices; every index is in exactly one of them.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlhf_mega.config.sections.offline import OfflineConfig
from marlhf_mega.config.sections.ppo import PPOConfig
from marlhf_mega.config.sections.training import SftConfig


@dataclass(frozen=True, kw_only=True)
class MicrobatchLimit:
    """Limits of one forward pass on one data-parallel rank."""

    sequences: int
    """Largest number of sequences."""
    tokens: int | None = None
    """Largest number of tokens, padding included, instead of `sequences`. None means no such
    limit."""
    packed: bool = False
    """Sequences are concatenated instead of padded."""

    @staticmethod
    def of(section: PPOConfig | SftConfig | OfflineConfig) -> "MicrobatchLimit":
        """Return the limits of training passes."""
        return MicrobatchLimit(
            sequences=section.microbatch_size,
            tokens=section.microbatch_tokens if isinstance(section, PPOConfig) else None,
            packed=bool(section.packing),
        )

    @staticmethod
    def of_scoring(section: PPOConfig) -> "MicrobatchLimit":
        """Return the limits of passes without a backward pass."""
        limit, factor = MicrobatchLimit.of(section), section.scoring_microbatch_factor
        return replace(
            limit,
            sequences=limit.sequences * factor,
            tokens=None if limit.tokens is None else limit.tokens * factor,
        )


def split_by_size(
    lengths: Sequence[int], *, microbatch_size: int, min_microbatches: int = 1, group: int = 1
) -> list[Tensor]:
    """Sort sequences by length and split them into microbatches of at most `microbatch_size`.

    There are as few microbatches as possible, but at least `min_microbatches`, which must not
    exceed the number of groups. Their sizes differ by at most one group.

    Args:
        lengths: tokens of each sequence; their number is a multiple of `group`.
        microbatch_size: a multiple of `group`.
        min_microbatches: fewest microbatches.
        group: so many neighbours stay together, next to each other.
    """
    members = torch.arange(len(lengths)).view(-1, group)
    longest = torch.tensor(lengths)[members].amax(1).tolist()
    num_microbatches = max(-(-len(lengths) // microbatch_size), min_microbatches)
    assert num_microbatches <= len(longest), (num_microbatches, len(longest))
    parts = _by_length(longest).tensor_split(num_microbatches)
    return [members[part].flatten() for part in parts]


def split_by_tokens(
    lengths: Sequence[int], *, max_tokens: int, min_microbatches: int = 1, packed: bool = False
) -> list[Tensor]:
    """Split sequences into few microbatches within `max_tokens` and of about the same cost.

    Padded, a microbatch costs its size times its longest sequence. Sequences are split in the order
    of their lengths, with the smallest number of microbatches and then the smallest largest cost.
    Packed, a microbatch costs the sum of its sequences, which are combined by best fit, longest
    first; that is close to optimal (MULTIFIT, Coffman, Garey and Johnson 1978).

    Args:
        lengths: tokens of each sequence, none of them above `max_tokens`.
        max_tokens: largest cost of a microbatch.
        min_microbatches: fewest microbatches; must not exceed the number of sequences.
        packed: whether sequences are concatenated instead of padded.
    """
    fill = _fill_packed if packed else _fill_padded
    num_microbatches = max(len(fill(lengths, max_tokens)), min_microbatches)
    assert num_microbatches <= len(lengths), (num_microbatches, len(lengths))
    low, high = max(lengths), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(fill(lengths, middle)) <= num_microbatches:
            high = middle
        else:
            low = middle + 1
    found = fill(lengths, high)
    while len(found) < num_microbatches:
        largest = max(range(len(found)), key=lambda number: len(found[number]))
        whole = found[largest]
        half = -(-len(whole) // 2)
        found[largest : largest + 1] = [whole[:half], whole[half:]]
    return [torch.tensor(indices) for indices in found]


def fewest_by_tokens(lengths: Sequence[int], *, max_tokens: int, packed: bool = False) -> int:
    """Return how many microbatches `split_by_tokens` needs."""
    assert max(lengths) <= max_tokens, (max(lengths), max_tokens)
    return len((_fill_packed if packed else _fill_padded)(lengths, max_tokens))


def assign_by_tokens(lengths: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """Assign to each rank the same number of sequences and about the same number of tokens.

    The longest come first, each to the rank with the fewest tokens so far and room left (Graham's
    longest-processing-time rule with a capacity).

    Args:
        lengths: tokens of each sequence; their number is a multiple of `num_ranks`.
        num_ranks: data-parallel ranks.

    Returns:
        Indices of every rank's sequences, in rising order.
    """
    share, rest = divmod(len(lengths), num_ranks)
    assert rest == 0, (len(lengths), num_ranks)
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in reversed(_by_length(lengths).tolist()):
        open_ranks = [rank for rank in range(num_ranks) if len(assigned[rank]) < share]
        rank = min(open_ranks, key=tokens.__getitem__)
        assigned[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(own) for own in assigned]


def _by_length(lengths: Sequence[int]) -> Tensor:
    """Order sequences from short to long; equal lengths keep their order."""
    return torch.tensor(lengths).argsort(stable=True)


def _fill_padded(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill one microbatch after the other, shortest first; return their indices."""
    found: list[list[int]] = [[]]
    for index in _by_length(lengths).tolist():
        if (len(found[-1]) + 1) * lengths[index] > max_tokens:
            found.append([])
        found[-1].append(index)
    return found


def _fill_packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each sequence, longest first, where it fits and the least room is left."""
    found: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in reversed(_by_length(lengths).tolist()):
        place = bisect_left(rooms, (lengths[index], 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = max_tokens, len(found)
            found.append([])
        found[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return found
