import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf_mega.config.sections.ppo import PPOConfig
from marlhf_mega.data.microbatch import (
    MicrobatchLimit,
    assign_by_tokens,
    fewest_by_tokens,
    split_by_size,
    split_by_tokens,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=24)


def sizes(microbatches: list[torch.Tensor]) -> list[int]:
    return [len(indices) for indices in microbatches]


def assert_partition_in_length_order(microbatches: list[torch.Tensor], lengths: list[int]) -> None:
    order = torch.cat(microbatches)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert [lengths[index] for index in order.tolist()] == sorted(lengths)
    assert min(sizes(microbatches)) >= 1


@given(LENGTHS, st.integers(1, 9), st.integers(1, 24))
def test_splitting_by_size_is_an_even_partition(
    lengths: list[int], microbatch_size: int, least: int
) -> None:
    least = min(least, len(lengths))
    found = split_by_size(lengths, microbatch_size=microbatch_size, min_microbatches=least)
    assert_partition_in_length_order(found, lengths)
    assert len(found) == max(-(-len(lengths) // microbatch_size), least)
    assert max(sizes(found)) <= microbatch_size
    assert max(sizes(found)) - min(sizes(found)) <= 1


def test_splitting_by_size_by_hand() -> None:
    found = split_by_size([30, 10, 20, 10, 40], microbatch_size=2)
    assert [indices.tolist() for indices in found] == [[1, 3], [2, 0], [4]]


def test_groups_stay_together_in_order_of_their_longest() -> None:
    lengths = [30, 10, 20, 10, 40, 1]
    found = split_by_size(lengths, microbatch_size=2, group=2)
    assert [indices.tolist() for indices in found] == [[2, 3], [0, 1], [4, 5]]
    found = split_by_size(lengths, microbatch_size=4, min_microbatches=2, group=2)
    assert [indices.tolist() for indices in found] == [[2, 3, 0, 1], [4, 5]]


def cost(indices: torch.Tensor, lengths: list[int]) -> int:
    return len(indices) * max(lengths[index] for index in indices.tolist())


@given(LENGTHS, st.integers(50, 300), st.integers(1, 24))
def test_splitting_by_tokens_stays_within_the_budget(
    lengths: list[int], max_tokens: int, least: int
) -> None:
    least = min(least, len(lengths))
    found = split_by_tokens(lengths, max_tokens=max_tokens, min_microbatches=least)
    assert_partition_in_length_order(found, lengths)
    assert len(found) == max(fewest_by_tokens(lengths, max_tokens=max_tokens), least)
    assert max(cost(indices, lengths) for indices in found) <= max_tokens


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
    assert len(found) == fewest
    assert max(cost(indices, lengths) for indices in found) == largest_costs[fewest]


@given(LENGTHS, st.integers(50, 300), st.integers(1, 24))
def test_packing_stays_within_the_budget(lengths: list[int], max_tokens: int, least: int) -> None:
    least = min(least, len(lengths))
    found = split_by_tokens(lengths, max_tokens=max_tokens, min_microbatches=least, packed=True)
    assert sorted(torch.cat(found).tolist()) == list(range(len(lengths)))
    fewest = fewest_by_tokens(lengths, max_tokens=max_tokens, packed=True)
    assert len(found) == max(fewest, least)
    assert min(sizes(found)) >= 1
    tokens = [sum(lengths[i] for i in part.tolist()) for part in found]
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
    assert fewest <= len(found) <= (11 * fewest + 6) // 9
    largest = max(sum(lengths[i] for i in part.tolist()) for part in found)
    assert largest <= best[len(found)] * 4 / 3


def test_packing_by_hand() -> None:
    # Two of at most 10: 6 + 3 and 5 + 4, where a split in the order of lengths would need three.
    found = split_by_tokens([3, 4, 5, 6], max_tokens=10, packed=True)
    assert [indices.tolist() for indices in found] == [[3, 0], [2, 1]]
    # Three although one would do: the longest goes alone, and the rest, 3 + 2 + 1, is halved.
    found = split_by_tokens([2, 9, 3, 1], max_tokens=20, min_microbatches=3, packed=True)
    assert sorted(sorted(i.tolist()) for i in found) == [[0, 2], [1], [3]]


@given(LENGTHS, st.integers(1, 4))
def test_assignment_gives_every_rank_as_many_sequences_and_nearly_as_many_tokens(
    lengths: list[int], num_ranks: int
) -> None:
    share = -(-len(lengths) // num_ranks)
    lengths += [1] * (share * num_ranks - len(lengths))
    dealt = assign_by_tokens(lengths, num_ranks=num_ranks)
    assert sorted(sample for own in dealt for sample in own) == list(range(len(lengths)))
    assert {len(own) for own in dealt} == {share}
    tokens = [sum(lengths[sample] for sample in own) for own in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_scoring_microbatches_are_larger_by_hand() -> None:
    ppo = PPOConfig(microbatch_size=2, scoring_microbatch_factor=3, packing=True)
    assert MicrobatchLimit.of(ppo) == MicrobatchLimit(sequences=2, packed=True)
    assert MicrobatchLimit.of_scoring(ppo) == MicrobatchLimit(sequences=6, packed=True)
    tokens = ppo.model_copy(update={"microbatch_tokens": 100})
    assert MicrobatchLimit.of_scoring(tokens).tokens == 300


def test_assignment_by_hand() -> None:
    # 9 | 7, then 6 joins 7 and 5 joins 9; 4 joins 13, which is less than 14; 1 takes what is left.
    assert assign_by_tokens([1, 9, 4, 7, 5, 6], num_ranks=2) == [[0, 1, 4], [2, 3, 5]]
