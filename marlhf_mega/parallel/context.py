"""Sequences shared by context-parallel ranks: who holds which tokens, and how they meet.

Every sequence is cut into two pieces for each rank; of 2n pieces rank r of n holds r and 2n-1-r. A
late token attends to many keys and an early one to few, so these two together are the same work on
every rank. The engine's attention expects this order, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from marlhf_mega.parallel.mesh import Group


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, as places in the row."""

    start: int
    """Where the sequence begins."""
    first: int
    """The piece's first token."""
    end: int
    """Behind its last."""


@dataclass(frozen=True)
class ContextShare:
    """This rank's tokens of a row."""

    lengths: tuple[int, ...]
    """Tokens of the row's sequences, in order; each a multiple of twice the ranks."""
    group: Group
    """The ranks that share them."""
    device: torch.device
    """Of the model."""

    @cached_property
    def pieces(self) -> list[Piece]:
        """What this rank holds, in its order."""
        return list(self._pieces(self.group.rank()))

    @cached_property
    def places(self) -> Tensor:
        """[row / ranks] int64: where in the row this rank's tokens are."""
        return self._places(self.pieces)

    @cached_property
    def _order(self) -> Tensor:
        """[row] int64: where in what all ranks hold, rank by rank, the row's tokens are."""
        ranks = range(self.group.size())
        return self._places([piece for rank in ranks for piece in self._pieces(rank)]).argsort()

    def find(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Look tokens of the row up among this rank's.

        Args:
            places: [tokens] int64, where they are in the row.

        Returns:
            [found] int64, which of them this rank holds; [found] int64, where among its own.
        """
        number = self.places.new_full((sum(self.lengths),), -1)
        number[self.places] = torch.arange(len(self.places), device=self.device)
        here = number[places]
        found = (here >= 0).nonzero()[:, 0]
        return found, here[found]

    def gather(self, own: Tensor) -> Tensor:
        """Collect the ranks' tokens in the row's order; gradients are summed on the way back.

        Args:
            own: [row / ranks, ...].

        Returns:
            [row, ...].
        """
        by_rank = gather_from_sequence_parallel_region(own, group=self.group)
        whole: Tensor = by_rank.index_select(0, self._order)
        return whole

    def sum(self, values: Tensor) -> Tensor:
        """Add what every rank knows of its tokens; each gets its own gradient back."""
        total: Tensor = reduce_from_tensor_model_parallel_region(values, self.group)
        return total

    def _pieces(self, rank: int) -> Iterator[Piece]:
        count, start = 2 * self.group.size(), 0
        for length in self.lengths:
            size, rest = divmod(length, count)
            assert not rest, (length, count)
            for number in (rank, count - 1 - rank):
                first = start + number * size
                yield Piece(start, first, first + size)
            start += length

    def _places(self, pieces: list[Piece]) -> Tensor:
        found = [torch.arange(piece.first, piece.end) for piece in pieces]
        return torch.cat(found).to(self.device)
