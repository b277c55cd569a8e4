import pytest

from marlhf_mega.train.stragglers import slow_ranks

TWO_STAGES = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ([1.0, 9.0, 1.1, 9.1, 0.9, 8.9], {}),
        ([1.0, 9.0, 1.6, 9.0, 1.1, 9.0], {2: 1.05}),
        ([1.0, 9.0, 1.5, 9.0, 1.0, 9.0], {}),
        ([1.0, 20.0, 3.0, 9.0, 1.0, 9.0], {1: 9.0, 2: 1.0}),
        ([0.1, 9.0, 0.5, 9.0, 0.1, 9.0], {}),
    ],
    ids=["stages differ", "1.52 times its peers", "1.5 times", "one in each stage", "too little"],
)
def test_a_rank_is_slow_beside_those_with_the_same_part_of_the_model(seconds, found):
    assert slow_ranks(seconds, TWO_STAGES, step_seconds=5.0) == pytest.approx(found)


def test_a_rank_without_peers_is_not_judged():
    assert slow_ranks([1.0, 50.0], [0.0, 1.0], step_seconds=5.0) == {}
