import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.data.microbatch import Microbatches, pad_sequences, split_by_size, split_by_tokens

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=24)


def test_padding_by_hand() -> None:
    tokens, mask = pad_sequences([[5, 6, 7], [], [8]], pad_id=9, multiple=4)
    assert tokens.tolist() == [[5, 6, 7, 9], [9, 9, 9, 9], [8, 9, 9, 9]]
    assert mask.tolist() == [[True, True, True, False], [False] * 4, [True, False, False, False]]
    assert tokens.dtype == torch.int64


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(0, 20),
)
def test_padding_keeps_every_token_and_rounds_the_length_up(
    sequences: list[list[int]], multiple: int, min_length: int
) -> None:
    tokens, mask = pad_sequences(sequences, pad_id=0, multiple=multiple, min_length=min_length)
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == sequences
    needed = max(*map(len, sequences), min_length, 1)
    assert tokens.shape[1] % multiple == 0
    assert needed <= tokens.shape[1] < needed + multiple


def sizes(microbatches: Microbatches) -> list[int]:
    return [len(indices) for indices in microbatches.indices]


def assert_partition_in_length_order(microbatches: Microbatches, lengths: list[int]) -> None:
    order = torch.cat(microbatches.indices)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert [lengths[index] for index in order.tolist()] == sorted(lengths)
    values = torch.tensor(lengths) * 10
    results = [values[indices] for indices in microbatches.indices]
    assert torch.equal(torch.cat(results)[microbatches.inverse], values)
    assert min(sizes(microbatches)) >= 1


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
def test_splitting_by_size_is_an_even_partition(
    lengths: list[int], microbatch_size: int, multiple: int
) -> None:
    needed = -(-len(lengths) // microbatch_size)
    rounded = -(-needed // multiple) * multiple
    if rounded > len(lengths):
        with pytest.raises(ValueError, match=f"num_samples={len(lengths)}: must fill {rounded}"):
            split_by_size(
                lengths, microbatch_size=microbatch_size, num_microbatches_multiple=multiple
            )
        return
    found = split_by_size(
        lengths, microbatch_size=microbatch_size, num_microbatches_multiple=multiple
    )
    assert_partition_in_length_order(found, lengths)
    assert len(found.indices) == rounded
    assert max(sizes(found)) <= microbatch_size
    assert max(sizes(found)) - min(sizes(found)) <= 1


def test_splitting_by_size_by_hand() -> None:
    found = split_by_size([30, 10, 20, 10, 40], microbatch_size=2)
    assert [indices.tolist() for indices in found.indices] == [[1, 3], [2, 0], [4]]
    assert found.inverse.tolist() == [3, 0, 2, 1, 4]


def cost(indices: torch.Tensor, lengths: list[int]) -> int:
    return len(indices) * max(lengths[index] for index in indices.tolist())


@given(LENGTHS, st.integers(50, 300), st.integers(1, 4))
def test_splitting_by_tokens_stays_within_the_budget(
    lengths: list[int], max_tokens: int, multiple: int
) -> None:
    fewest = len(split_by_tokens(lengths, max_tokens=max_tokens).indices)
    needed = -(-fewest // multiple) * multiple
    if needed > len(lengths):
        with pytest.raises(ValueError, match=f"num_samples={len(lengths)}: must fill {needed} mic"):
            split_by_tokens(lengths, max_tokens=max_tokens, num_microbatches_multiple=multiple)
        return
    found = split_by_tokens(lengths, max_tokens=max_tokens, num_microbatches_multiple=multiple)
    assert_partition_in_length_order(found, lengths)
    assert len(found.indices) == needed
    assert max(cost(indices, lengths) for indices in found.indices) <= max_tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(50, 300))
def test_no_other_cut_is_smaller_or_better_balanced(lengths: list[int], max_tokens: int) -> None:
    found = split_by_tokens(lengths, max_tokens=max_tokens)
    ordered = sorted(lengths)
    largest_costs: dict[int, int] = {}
    for num_cuts in range(len(ordered)):
        for cuts in itertools.combinations(range(1, len(ordered)), num_cuts):
            parts = [ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))]
            largest = max(len(part) * part[-1] for part in parts)
            best = largest_costs.get(len(parts), largest)
            largest_costs[len(parts)] = min(best, largest)
    fewest = min(number for number, largest in largest_costs.items() if largest <= max_tokens)
    assert len(found.indices) == fewest
    assert max(cost(indices, lengths) for indices in found.indices) == largest_costs[fewest]


def test_one_sequence_above_the_token_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_tokens=10: must hold the longest sequence; it has 1"):
        split_by_tokens([3, 11], max_tokens=10)
