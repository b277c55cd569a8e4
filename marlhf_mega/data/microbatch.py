"""Pad sequences and cut a rank's samples into microbatches of similar lengths."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import BoolTensor, Tensor

from marlhf_mega.config.schema import OfflineConfig, PPOConfig, SftConfig


@dataclass(frozen=True, kw_only=True)
class MicrobatchLimit:
    """How much goes through a model at a time on one data-parallel rank."""

    rows: int
    """Most sequences."""
    tokens: int | None = None
    """Most tokens, with the padding if there is any, instead of a number of sequences."""
    packed: bool = False
    """Sequences lie one after the other in one row, without padding."""

    @staticmethod
    def of(section: PPOConfig | SftConfig | OfflineConfig) -> "MicrobatchLimit":
        """Return what the configuration says of passes that train."""
        return MicrobatchLimit(
            rows=section.microbatch_size,
            tokens=section.microbatch_tokens if isinstance(section, PPOConfig) else None,
            packed=section.packing,
        )

    @staticmethod
    def of_scoring(section: PPOConfig) -> "MicrobatchLimit":
        """Return what it says of passes that keep nothing."""
        limit, factor = MicrobatchLimit.of(section), section.scoring_microbatch_factor
        return replace(
            limit,
            rows=limit.rows * factor,
            tokens=None if limit.tokens is None else limit.tokens * factor,
        )


@dataclass(frozen=True, kw_only=True)
class Microbatches:
    """A partition of samples 0..n-1, each sample in exactly one microbatch."""

    indices: list[Tensor]
    """One int64 vector of sample indices per microbatch."""

    @property
    def inverse(self) -> Tensor:
        """[n] int64: `torch.cat(results)[inverse]` puts per-sample results back in order."""
        order = torch.cat(self.indices)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return inverse


def pad_sequences(
    sequences: Sequence[Sequence[int]], *, pad_id: int, multiple: int = 1, min_length: int = 0
) -> tuple[Tensor, BoolTensor]:
    """Pad sequences on the right to a common length.

    Args:
        sequences: one list of token ids per sample, none of them all the rest: at least one.
        pad_id: id of the padding.
        multiple: the length is rounded up to a multiple of this (tensor and context parallel
            sizes, FP8 blocks).
        min_length: the length is at least this, so that several tensors can share a shape.

    Returns:
        tokens [batch, seq] int64 and mask [batch, seq] bool, True at real tokens.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    length = round_up(max(int(lengths.max()), min_length, 1), multiple)
    mask = torch.arange(length) < lengths[:, None]
    tokens = torch.full(mask.shape, pad_id, dtype=torch.long)
    tokens[mask] = torch.tensor(
        [token for sequence in sequences for token in sequence], dtype=torch.long
    )
    return tokens, mask  # type: ignore[return-value]


def round_up(value: int, multiple: int) -> int:
    """Round a count up to a multiple."""
    return -(-value // multiple) * multiple


def split_by_size(
    lengths: Sequence[int], *, microbatch_size: int, min_microbatches: int = 1
) -> Microbatches:
    """Sort samples by length and cut them into microbatches of at most `microbatch_size`.

    There are as few microbatches as that allows, but at least `min_microbatches`, which must not
    be more than there are samples; sizes differ by at most one.
    """
    num_microbatches = max(-(-len(lengths) // microbatch_size), min_microbatches)
    assert num_microbatches <= len(lengths), (num_microbatches, len(lengths))
    return Microbatches(indices=list(_by_length(lengths).tensor_split(num_microbatches)))


def split_by_tokens(
    lengths: Sequence[int], *, max_tokens: int, min_microbatches: int = 1, packed: bool = False
) -> Microbatches:
    """Cut samples so that microbatches are few, within `max_tokens` and of about the same cost.

    Padded, a microbatch costs its size times its longest sequence, and samples are cut in the order
    of their lengths; the number of microbatches and then the largest cost are the smallest that
    such cuts can have. Packed, it costs the sum of its sequences, and samples are put together by
    best fit, longest first; that is near the smallest (MULTIFIT, Coffman, Garey and Johnson 1978).

    Args:
        lengths: tokens of each sample, none of them above `max_tokens`.
        max_tokens: largest cost.
        min_microbatches: make at least so many; must not be more than there are samples.
        packed: how microbatches are laid out.
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
    return Microbatches(indices=[torch.tensor(samples) for samples in found])


def fewest_by_tokens(lengths: Sequence[int], *, max_tokens: int, packed: bool = False) -> int:
    """Return how many microbatches `split_by_tokens` needs."""
    assert max(lengths) <= max_tokens, (max(lengths), max_tokens)
    return len((_fill_packed if packed else _fill_padded)(lengths, max_tokens))


def deal_by_tokens(lengths: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """Deal samples to ranks: the same number to each, and about the same number of tokens.

    The longest go first, each to the rank with the fewest tokens so far that has room (Graham's
    longest-processing-time rule with a capacity).

    Args:
        lengths: tokens of each sample; as many as a multiple of `num_ranks`.
        num_ranks: data-parallel ranks.

    Returns:
        Sample indices of every rank, in rising order.
    """
    share, rest = divmod(len(lengths), num_ranks)
    assert rest == 0, (len(lengths), num_ranks)
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for sample in reversed(_by_length(lengths).tolist()):
        open_ranks = [rank for rank in range(num_ranks) if len(dealt[rank]) < share]
        rank = min(open_ranks, key=tokens.__getitem__)
        dealt[rank].append(sample)
        tokens[rank] += lengths[sample]
    return [sorted(own) for own in dealt]


def _by_length(lengths: Sequence[int]) -> Tensor:
    """Order samples from short to long; equal lengths keep their order."""
    return torch.tensor(lengths).argsort(stable=True)


def _fill_padded(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill one microbatch after the other from short to long; returns their samples."""
    found: list[list[int]] = [[]]
    for sample in _by_length(lengths).tolist():
        if (len(found[-1]) + 1) * lengths[sample] > max_tokens:
            found.append([])
        found[-1].append(sample)
    return found


def _fill_packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each sample, longest first, where the least room is left that holds it."""
    found: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for sample in reversed(_by_length(lengths).tolist()):
        place = bisect_left(rooms, (lengths[sample], 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = max_tokens, len(found)
            found.append([])
        found[number].append(sample)
        insort(rooms, (room - lengths[sample], number))
    return found
