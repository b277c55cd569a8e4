import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.masked import masked_moments
from marlhf_mega.algorithm.rewards import (
    RunningMoments,
    adaptive_kl_coef,
    handle_missing_eos,
    kl_estimate,
    last_token_positions,
    shape_scores,
    token_rewards,
)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("abs", 0.5, -1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k3_straight_through", math.exp(0.5) - 1.5, -0.5),
    ],
)
def test_kl_estimators_and_their_gradients(estimator, value, gradient):
    logprob = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    kl = kl_estimate(logprob, torch.tensor(-1.0, dtype=torch.float64), estimator)
    kl.backward()
    assert kl.item() == pytest.approx(value)
    assert logprob.grad.item() == pytest.approx(gradient)


def test_k3_is_bounded_for_absurd_tokens():
    kl = kl_estimate(torch.tensor([-800.0, 0.0]), torch.tensor([0.0, -800.0]), "k3")
    assert kl.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("estimator", ["k1", "k3", "k2"])
def test_kl_estimators_average_to_the_divergence(estimator):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.35, 0.25])
    exact = (policy * (policy / reference).log()).sum()
    mean = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
    # k2 is biased; to second order it agrees.
    assert mean.item() == pytest.approx(exact.item(), rel=0.1 if estimator == "k2" else 1e-5)


def test_the_clipped_score_lands_on_the_last_real_token():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scores = torch.tensor([9.0, -1.0, 5.0])
    positions = last_token_positions(mask)
    assert positions.tolist() == [2, 3, -1]
    rewards = token_rewards(kl, scores, positions, kl_coef=0.5, score_clip=2.5)
    expected = torch.tensor([[-0.05, -0.1, 2.35], [-1.2, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)
    packed = token_rewards(
        kl[mask], scores[:2], torch.tensor([3, 4]) - 1, kl_coef=0.5, score_clip=2.5
    )
    torch.testing.assert_close(packed, expected[mask])


@pytest.mark.parametrize(
    ("mode", "expected"), [("none", [3.0, 2.0]), ("subtract", [3.0, 1.5]), ("replace", [3.0, 0.5])]
)
def test_missing_eos(mode, expected):
    ends_with_eos = torch.tensor([True, False])
    scores = handle_missing_eos(torch.tensor([3.0, 2.0]), ends_with_eos, mode=mode, value=0.5)
    assert scores.tolist() == expected


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("none", [1.0, 4.0]), ("running", [-0.5, 1.0]), ("running_scale", [0.5, 2.0])],
)
def test_score_shaping(normalize, expected):
    moments = RunningMoments(count=3, mean=2.0, square_deviation=8.0)  # standard deviation 2
    scores = torch.tensor([1.5, 4.5])
    shaped = shape_scores(scores, moments, normalize=normalize, reference_scores=0.5)
    assert shaped.tolist() == expected
    clipped = shape_scores(scores, moments, normalize=normalize, reference_scores=0.5, clip=0.75)
    assert clipped.tolist() == [min(max(x, -0.75), 0.75) for x in expected]


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=5))
def test_running_moments_equal_the_moments_of_everything_seen(batches):
    moments = RunningMoments()
    for batch in batches:
        scores = torch.tensor(batch, dtype=torch.float64)
        moments = moments.update(masked_moments(scores, torch.ones_like(scores)))
    seen = [score for batch in batches for score in batch]
    assert moments.count == len(seen)
    assert moments.mean == pytest.approx(statistics.fmean(seen) if seen else 0.0, abs=1e-9)
    if len(seen) > 1 and statistics.stdev(seen) > 1e-3:
        assert moments.std == pytest.approx(statistics.stdev(seen), rel=1e-6)


def test_running_moments_do_not_scale_before_anything_varied():
    assert RunningMoments().std == 1.0
    once = RunningMoments().update(masked_moments(torch.tensor([5.0]), torch.ones(1)))
    assert (once.mean, once.std) == (5.0, 1.0)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * 1.001), (60.0, 0.1 * 1.002), (0.0, 0.0998), (math.nan, 0.1)],
)
def test_kl_coefficient_moves_towards_the_target(observed, expected):
    found = adaptive_kl_coef(0.1, observed, target=6.0, horizon=10000, num_samples=100)
    assert found == pytest.approx(expected)
