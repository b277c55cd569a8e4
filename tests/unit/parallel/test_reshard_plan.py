"""Moving weights between layouts, run in one process on plain lists."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf_mega.parallel.reshard_plan import (
    Block,
    padded_bytes,
    plan_transfers,
    schedule_rounds,
)

INDEX_BYTES = 12


def cut(total, bounds, rank_of_part):
    """Blocks of a tensor of `total` indices cut at `bounds`, on the ranks that hold each part."""
    edges = [0, *sorted(bounds), total]
    return [
        (rank, lo, hi)
        for lo, hi, ranks in zip(edges, edges[1:], rank_of_part, strict=False)
        for rank in ranks
        if lo < hi
    ]


def layout(draw, num_ranks, totals):
    """Any layout: every tensor cut anywhere, every part on one rank or more, in any order."""
    blocks = [[] for _ in range(num_ranks)]
    sizes = [[] for _ in range(num_ranks)]
    for tensor, total in enumerate(totals):
        bounds = draw(st.lists(st.integers(0, total), max_size=3))
        owners = [
            draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)) for _ in range(len(bounds) + 1)
        ]
        for rank, lo, hi in cut(total, bounds, owners):
            start = draw(st.integers(0, 3))
            blocks[rank].append(
                Block(
                    tensor=str(tensor),
                    dim=0,
                    lo=lo,
                    hi=hi,
                    parameter=len(sizes[rank]),
                    start=start,
                    index_bytes=INDEX_BYTES,
                )
            )
            sizes[rank].append(start + hi - lo)
    return blocks, sizes


@st.composite
def moves(draw):
    num_ranks = draw(st.integers(1, 5))
    totals = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    return layout(draw, num_ranks, totals), layout(draw, num_ranks, totals)


def contents(blocks, sizes):
    """Parameters whose every place says which index of which tensor it holds."""
    parameters = [[[None] * size for size in rank] for rank in sizes]
    for rank, own in enumerate(blocks):
        for block in own:
            for offset in range(block.hi - block.lo):
                place = (block.tensor, block.lo + offset)
                parameters[rank][block.parameter][block.start + offset] = place
    return parameters


def apply(transfers, before, after):
    for t in transfers:
        for offset in range(t.size):
            value = before[t.source][t.source_parameter][t.source_start + offset]
            place = after[t.target][t.target_parameter]
            assert place[t.target_start + offset] is None
            place[t.target_start + offset] = value


@settings(max_examples=150, deadline=None)
@given(moves(), st.integers(1, 200))
def test_every_index_arrives_once_and_rounds_respect_the_limit(both, limit):
    (sources, source_sizes), (targets, target_sizes) = both
    plan = plan_transfers(sources, targets)
    rounds = schedule_rounds(plan, limit_bytes=limit)
    before = contents(sources, source_sizes)
    wanted = contents(targets, target_sizes)
    after = [[[None] * size for size in rank] for rank in target_sizes]
    apply([t for t in plan if t.is_local], before, after)
    for transfers in rounds:
        apply(transfers, before, after)
        for rank in range(len(sources)):
            for side in ("source", "target"):
                mine = [padded_bytes(t) for t in transfers if getattr(t, side) == rank]
                assert sum(mine) <= limit or len(mine) == 1
    assert after == wanted
    assert all(not t.is_local for transfers in rounds for t in transfers)


def blocks_of(*ranges):
    return [
        [
            Block(tensor="w", dim=0, lo=lo, hi=hi, parameter=0, start=0, index_bytes=4)
            for lo, hi in own
        ]
        for own in ranges
    ]


def test_a_rank_does_not_send_what_its_target_already_holds():
    halves, whole = blocks_of([(0, 4)], [(4, 8)]), blocks_of([(0, 8)], [(0, 8)])
    assert all(t.is_local for t in plan_transfers(whole, halves))
    plan = plan_transfers(halves, whole)
    assert [(t.source, t.target, t.size) for t in plan if not t.is_local] == [(1, 0, 4), (0, 1, 4)]


def test_replicas_share_the_sending():
    plan = plan_transfers(
        blocks_of([(0, 8)], [(0, 8)], [], []), blocks_of([], [], [(0, 8)], [(0, 8)])
    )
    assert sorted(t.source for t in plan) == [0, 1]


def test_an_index_that_no_rank_holds_is_an_error():
    with pytest.raises(
        RuntimeError,
        match=r"^w: some rank must hold index 4, which rank 1 needs; none does\. Build",
    ):
        plan_transfers(blocks_of([(0, 4)], []), blocks_of([], [(0, 8)]))
