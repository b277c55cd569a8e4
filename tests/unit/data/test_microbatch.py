import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf_mega.config.schema import PPOConfig
from marlhf_mega.data.microbatch import (
    Microbatches,
    MicrobatchLimit,
    deal_by_tokens,
    fewest_by_tokens,
    pad_sequences,
    split_by_size,
    split_by_tokens,
)

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


@given(LENGTHS, st.integers(1, 9), st.integers(1, 24))
def test_splitting_by_size_is_an_even_partition(
    lengths: list[int], microbatch_size: int, least: int
) -> None:
    least = min(least, len(lengths))
    found = split_by_size(lengths, microbatch_size=microbatch_size, min_microbatches=least)
    assert_partition_in_length_order(found, lengths)
    assert len(found.indices) == max(-(-len(lengths) // microbatch_size), least)
    assert max(sizes(found)) <= microbatch_size
    assert max(sizes(found)) - min(sizes(found)) <= 1


def test_splitting_by_size_by_hand() -> None:
    found = split_by_size([30, 10, 20, 10, 40], microbatch_size=2)
    assert [indices.tolist() for indices in found.indices] == [[1, 3], [2, 0], [4]]
    assert found.inverse.tolist() == [3, 0, 2, 1, 4]


def cost(indices: torch.Tensor, lengths: list[int]) -> int:
    return len(indices) * max(lengths[index] for index in indices.tolist())


@given(LENGTHS, st.integers(50, 300), st.integers(1, 24))
def test_splitting_by_tokens_stays_within_the_budget(
    lengths: list[int], max_tokens: int, least: int
) -> None:
    least = min(least, len(lengths))
    found = split_by_tokens(lengths, max_tokens=max_tokens, min_microbatches=least)
    assert_partition_in_length_order(found, lengths)
    assert len(found.indices) == max(fewest_by_tokens(lengths, max_tokens=max_tokens), least)
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


@given(LENGTHS, st.integers(50, 300), st.integers(1, 24))
def test_packing_stays_within_the_budget(lengths: list[int], max_tokens: int, least: int) -> None:
    least = min(least, len(lengths))
    found = split_by_tokens(lengths, max_tokens=max_tokens, min_microbatches=least, packed=True)
    assert sorted(torch.cat(found.indices).tolist()) == list(range(len(lengths)))
    fewest = fewest_by_tokens(lengths, max_tokens=max_tokens, packed=True)
    assert len(found.indices) == max(fewest, least)
    assert min(sizes(found)) >= 1
    tokens = [sum(lengths[i] for i in part.tolist()) for part in found.indices]
    assert max(tokens) <= max_tokens


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(50, 150))
def test_packing_is_near_the_best_of_all_partitions(lengths: list[int], max_tokens: int) -> None:
    best: dict[int, int] = {}
    for places in itertools.product(range(len(lengths)), repeat=len(lengths)):
        tokens = [0] * len(lengths)
        for place, length in zip(places, lengths, strict=True):
            tokens[place] += length
        number = sum(t > 0 for t in tokens)
        best[number] = min(best.get(number, max(tokens)), max(tokens))
    found = split_by_tokens(lengths, max_tokens=max_tokens, packed=True)
    fewest = min(number for number, largest in best.items() if largest <= max_tokens)
    # Best fit, longest first, takes at most 11/9 of the fewest, plus 6/9 (Dosa et al. 2013).
    assert fewest <= len(found.indices) <= (11 * fewest + 6) // 9
    largest = max(sum(lengths[i] for i in part.tolist()) for part in found.indices)
    assert largest <= best[len(found.indices)] * 4 / 3


def test_packing_by_hand() -> None:
    # Two of at most 10: 6 + 3 and 5 + 4, where a cut in the order of lengths would need three.
    found = split_by_tokens([3, 4, 5, 6], max_tokens=10, packed=True)
    assert [indices.tolist() for indices in found.indices] == [[3, 0], [2, 1]]
    # Three although one would do: the longest goes alone, and the rest, 3 + 2 + 1, is halved.
    found = split_by_tokens([2, 9, 3, 1], max_tokens=20, min_microbatches=3, packed=True)
    assert sorted(sorted(i.tolist()) for i in found.indices) == [[0, 2], [1], [3]]


@given(LENGTHS, st.integers(1, 4))
def test_dealing_gives_every_rank_as_many_samples_and_nearly_as_many_tokens(
    lengths: list[int], num_ranks: int
) -> None:
    share = -(-len(lengths) // num_ranks)
    lengths += [1] * (share * num_ranks - len(lengths))
    dealt = deal_by_tokens(lengths, num_ranks=num_ranks)
    assert sorted(sample for own in dealt for sample in own) == list(range(len(lengths)))
    assert {len(own) for own in dealt} == {share}
    tokens = [sum(lengths[sample] for sample in own) for own in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_scoring_takes_more_at_a_time_by_hand() -> None:
    ppo = PPOConfig(microbatch_size=2, scoring_microbatch_factor=3, packing=True)
    assert MicrobatchLimit.of(ppo) == MicrobatchLimit(rows=2, packed=True)
    assert MicrobatchLimit.of_scoring(ppo) == MicrobatchLimit(rows=6, packed=True)
    tokens = ppo.model_copy(update={"microbatch_tokens": 100})
    assert MicrobatchLimit.of_scoring(tokens).tokens == 300


def test_dealing_by_hand() -> None:
    # 9 | 7, then 6 joins 7 and 5 joins 9; 4 joins 13, which is less than 14; 1 takes what is left.
    assert deal_by_tokens([1, 9, 4, 7, 5, 6], num_ranks=2) == [[0, 1, 4], [2, 3, 5]]
