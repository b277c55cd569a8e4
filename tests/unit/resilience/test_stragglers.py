import pytest
import torch

from marlhf_mega.resilience.stragglers import slow_ranks

TWO_STAGES = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ([1.0, 9.0, 1.1, 9.1, 0.9, 8.9], {}),
        ([1.0, 9.0, 1.7, 9.0, 1.1, 9.0], {2: 1.1}),
        ([1.0, 9.0, 1.5, 9.0, 1.0, 9.0], {}),
        ([1.0, 20.0, 3.0, 9.0, 1.0, 9.0], {1: 9.0, 2: 1.0}),
        ([0.1, 9.0, 0.5, 9.0, 0.1, 9.0], {}),
    ],
    ids=["stages differ", "1.55 times its peers", "1.5 times", "one in each stage", "too little"],
)
def test_a_rank_is_compared_with_those_that_hold_the_same_part_of_the_model(seconds, found):
    column = torch.tensor(seconds)[:, None]
    slow, usual = slow_ranks(column, torch.tensor(TWO_STAGES), step_seconds=5.0)
    assert slow.nonzero()[:, 0].tolist() == list(found)
    assert usual[slow].tolist() == pytest.approx(list(found.values()))


def test_of_two_replicas_the_slower_is_found_in_each_phase():
    seconds = torch.tensor([[1.0, 5.0], [4.0, 1.0]])
    slow, usual = slow_ranks(seconds, torch.zeros(2), step_seconds=5.0)
    assert slow.tolist() == [[False, True], [True, False]]
    assert usual.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_rank_without_peers_is_never_slow():
    seconds = torch.tensor([[1.0], [50.0]])
    assert not slow_ranks(seconds, torch.tensor([0.0, 1.0]), step_seconds=5.0)[0].any()
