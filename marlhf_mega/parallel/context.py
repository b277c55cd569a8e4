"""Zigzag sharding of sequences over context-parallel ranks.

Each of n ranks holds two of a sequence's 2n pieces: rank r holds pieces r and 2n-1-r. Under a
causal mask late tokens attend to many keys and early ones to few, so the two pieces together are
the same amount of work on every rank. Transformer Engine's attention expects this order as well.
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
class SequencePiece:
    """Consecutive tokens of one sequence, as indices in the row."""

    start: int
    """First token of the sequence."""
    first: int
    """First token of the piece."""
    end: int
    """One past its last token."""


@dataclass(frozen=True)
class ContextShare:
    """This rank's tokens of a row."""

    lengths: tuple[int, ...]
    """Tokens of the row's sequences, in order; each a multiple of twice the number of ranks."""
    group: Group
    """The context-parallel ranks."""
    device: torch.device
    """The model's device."""

    @cached_property
    def pieces(self) -> list[SequencePiece]:
        """The pieces that this rank holds, in order."""
        return list(self._pieces(self.group.rank()))

    @cached_property
    def indices(self) -> Tensor:
        """[row/cp] int64: indices in the row of this rank's tokens."""
        return self._indices(self.pieces)

    @cached_property
    def _order(self) -> Tensor:
        """[row] int64: where the row's tokens are in the concatenation of all ranks' tokens."""
        ranks = range(self.group.size())
        return self._indices([piece for rank in ranks for piece in self._pieces(rank)]).argsort()

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Find tokens of the row among those that this rank holds.

        Args:
            indices: [tokens] int64, their indices in the row.

        Returns:
            [found] int64, which of them this rank holds; [found] int64, where among its tokens.
        """
        local_index = self.indices.new_full((sum(self.lengths),), -1)
        local_index[self.indices] = torch.arange(len(self.indices), device=self.device)
        local = local_index[indices]
        found = (local >= 0).nonzero()[:, 0]
        return found, local[found]

    def gather(self, own: Tensor) -> Tensor:
        """Gather the ranks' tokens in the order of the row; backward sums the gradients.

        Args:
            own: [row/cp, ...].

        Returns:
            [row, ...].
        """
        by_rank = gather_from_sequence_parallel_region(own, group=self.group)
        whole: Tensor = by_rank.index_select(0, self._order)
        return whole

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks; backward passes the gradient through unchanged."""
        total: Tensor = reduce_from_tensor_model_parallel_region(values, self.group)
        return total

    def _pieces(self, rank: int) -> Iterator[SequencePiece]:
        count, start = 2 * self.group.size(), 0
        for length in self.lengths:
            size, rest = divmod(length, count)
            assert not rest, (length, count)
            for number in (rank, count - 1 - rank):
                first = start + number * size
                yield SequencePiece(start, first, first + size)
            start += length

    def _indices(self, pieces: list[SequencePiece]) -> Tensor:
        found = [torch.arange(piece.first, piece.end) for piece in pieces]
        return torch.cat(found).to(self.device)
