import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.masked import masked_moments
from marlhf_mega.algorithm.rewards import (
    RunningMoments,
    adaptive_kl_coef,
    handle_missing_eos,
    kl_estimate,
    last_token_positions,
    log_ratio_rewards,
    segment_rewards,
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
    scores = torch.tensor([1.0, 4.0])
    shaped = shape_scores(scores, moments, normalize=normalize)
    assert shaped.tolist() == expected
    clipped = shape_scores(scores, moments, normalize=normalize, clip=0.75)
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


def test_the_log_ratio_of_rto_by_hand():
    dpo, reference = torch.tensor([[-1.0, -1.0, -3.0]]).double(), torch.tensor([[-1.3, -3, -1.0]])
    found = log_ratio_rewards(dpo, reference.double(), weight=0.05)
    assert found.tolist() == [pytest.approx([0.015, 0.1, -0.1], abs=1e-8)]
    found = log_ratio_rewards(dpo, reference.double(), weight=0.05, clip=0.05)
    assert found.tolist() == [pytest.approx([0.015, 0.05, -0.05], abs=1e-8)]


def test_the_last_token_of_every_segment_is_paid_by_hand():
    """The sentences of relevance +-0.3 and factuality +-0.5 in Fine-Grained RLHF."""
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    clauses = MacroActions.from_starts(
        torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool(), mask
    )
    whole = MacroActions.from_starts(torch.tensor([[1, 0, 0, 0, 0]] * 2).bool(), mask)
    signs = torch.tensor([[9.0, 1, -1, 9, 1], [9, -1, 9, 9, 9]])
    found = segment_rewards(signs, clauses, weight=0.3) + segment_rewards(
        signs, whole, weight=9.0, clip=0.5
    )
    assert found.tolist() == [
        pytest.approx([0, 0.3, -0.3, 0, 0.8]),
        pytest.approx([0, -0.8, 0, 0, 0]),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_segment_rewards_by_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (4,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    starts = (torch.rand(4, 6, generator=generator) < 0.4) & mask
    starts[:, 0] = mask[:, 0]
    scores = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = segment_rewards(scores, MacroActions.from_starts(starts, mask), weight=0.7, clip=0.9)
    for row in range(4):
        for t in range(6):
            is_end = t + 1 == lengths[row] or (t + 1 < lengths[row] and bool(starts[row, t + 1]))
            paid = min(max(0.7 * scores[row, t].item(), -0.9), 0.9) if is_end else 0
            assert found[row, t].item() == pytest.approx(paid, abs=1e-9)
