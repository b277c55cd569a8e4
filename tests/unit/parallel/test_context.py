"""Zigzag sharding: which rank holds which tokens."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.parallel.context import ContextShare, SequencePiece

CPU = torch.device("cpu")


@dataclass
class Group:
    number: int
    count: int

    def rank(self):
        return self.number

    def size(self):
        return self.count


def shares(lengths, count):
    return [ContextShare(tuple(lengths), Group(number, count), CPU) for number in range(count)]


def test_pieces_worked_by_hand():
    first, second = shares([8, 4], 2)
    assert first.pieces == [
        SequencePiece(0, 0, 2),
        SequencePiece(0, 6, 8),
        SequencePiece(8, 8, 9),
        SequencePiece(8, 11, 12),
    ]
    assert first.indices.tolist() == [0, 1, 6, 7, 8, 11]
    assert second.indices.tolist() == [2, 3, 4, 5, 9, 10]


def test_each_token_is_found_on_the_rank_that_holds_it():
    first, second = shares([8, 4], 2)
    indices = torch.tensor([7, 2, 8, 11, 5])
    found, here = first.find(indices)
    assert (found.tolist(), here.tolist()) == ([0, 2, 3], [3, 4, 5])
    found, here = second.find(indices)
    assert (found.tolist(), here.tolist()) == ([1, 4], [0, 3])


@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), count=st.integers(1, 5))
def test_every_token_is_held_once_and_every_rank_has_equal_work(pieces, count):
    lengths = [2 * count * n for n in pieces]
    everyone = shares(lengths, count)
    held = sorted(index for share in everyone for index in share.indices.tolist())
    assert held == list(range(sum(lengths)))
    starts = [start for share in everyone for start in {piece.start for piece in share.pieces}]
    assert set(starts) == {sum(lengths[:n]) for n in range(len(lengths))}
    pairs = {
        sum(index - p.start + 1 for p in share.pieces for index in range(p.first, p.end))
        for share in everyone
    }
    assert len(pairs) == 1
