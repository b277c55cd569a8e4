"""Shaping by the worked numbers of the papers' code and by loops over samples."""

import math
import random

import pytest
import torch

from marlhf_mega.algorithm.masked import masked_moments, mean_and_variance
from marlhf_mega.algorithm.shaping import (
    center_reference,
    constrained,
    length_penalty,
    maxmin,
    overlong,
    par,
    robust,
    within_kl,
    without_praise,
    z_score,
)

NAN = float("nan")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_two_groups_by_hand():
    """The minimum of each sample, as the released code of MaxMin-RLHF, and the worse group."""
    scores = doubles([1.0, 2.0], [3.0, 0.0])
    assert robust(scores, mean_weight=0).tolist() == [1, 0]
    assert robust(scores, mean_weight=1).tolist() == [2, 1]
    assert robust(scores, mean_weight=0.25).tolist() == [1.25, 0.25]
    assert maxmin(scores, doubles(1.5, 1.5)).tolist() == [1, 2]
    assert maxmin(scores, doubles(1.5, 1.4)).tolist() == [3, 0]


@pytest.mark.parametrize("seed", range(3))
def test_an_ensemble_by_a_loop(seed):
    draw = random.Random(seed)
    scores = [[draw.gauss(0, 1) for _ in range(5)] for _ in range(4)]
    weight = draw.random()
    found = robust(doubles(*scores), mean_weight=weight)
    for i, own in enumerate(zip(*scores, strict=True)):
        expected = weight * sum(own) / 4 + (1 - weight) * min(own)
        assert found[i].item() == pytest.approx(expected, abs=1e-9)


def test_a_violation_earns_nothing_and_is_never_praised():
    """CGPO's example: the first sample violates, its reward is 0, and the mean punishes it."""
    rewards = center_reference(doubles(2, 0.5, 1), doubles([1.0], [1.0], [1.0]))
    holds = torch.tensor([False, True, True])
    found = constrained(rewards * doubles(0.8, 0.6, 0), holds)
    assert found.tolist() == pytest.approx([0, 0.226524, 0], abs=1e-6)
    centred = found - found.mean()
    assert centred.tolist() == pytest.approx([-0.075508, 0.151016, -0.075508], abs=1e-6)
    assert constrained(doubles(-2, -2), torch.tensor([True, False])).tolist() == [-2, -2]
    advantages = doubles([1.0, -1.0], [1.0, -1.0])
    found = without_praise(advantages, torch.tensor([True, False]))
    assert found.tolist() == [[1, -1], [0, -1]]


def test_par_by_hand():
    found = par(doubles(1.5), doubles([1.0, 0.5, 2.0]))
    by_hand = (sigmoid(0.5) + sigmoid(1.0) + sigmoid(-0.5)) / 3
    assert found.item() == pytest.approx(by_hand, abs=1e-9)
    assert found.item() == pytest.approx(0.577020, abs=1e-6)
    assert par(doubles(1.5), doubles([1.0]), scale=2.0).item() == pytest.approx(sigmoid(1), 1e-9)


def test_the_calibration_of_cgpo_by_hand():
    """Its regularised rewards, whose factor max(1 - kl / 5, 0) takes kl 1, 2, 6."""
    found = center_reference(doubles(2, 0.5, 1), doubles([1.0], [1.0], [1.0]))
    regularised = found * doubles(0.8, 0.6, 0)
    assert regularised.tolist() == pytest.approx([0.584847, 0.226524, 0], abs=1e-6)
    assert found.tolist() == pytest.approx([sigmoid(1), sigmoid(-0.5), 0.5], abs=1e-9)


def test_the_penalty_of_dapo_by_hand():
    lengths = torch.tensor([10, 80, 85, 95, 100])
    found = overlong(torch.zeros(5), lengths, longest=100, buffer=20)
    assert found.tolist() == [0, 0, -0.25, -0.75, -1]
    assert overlong(doubles(1.0), lengths[2:3], longest=100, buffer=20, factor=2).tolist() == [0.5]


def test_the_length_penalty_by_hand():
    found = length_penalty(doubles(1, 1, 1), torch.tensor([5, 8, 12]), coef=0.25, limit=8)
    assert found.tolist() == [1, 1, 0]


def test_z_score_by_hand():
    scores = doubles(1, 2, 3, 6)
    mean, variance = mean_and_variance(masked_moments(scores, torch.ones(4)))
    found = z_score(scores, mean=mean, variance=variance)
    assert found.tolist() == pytest.approx([x / (14 / 3) ** 0.5 for x in (-2, -1, 0, 3)], abs=1e-8)


def test_equal_scores_are_all_zero():
    mean, variance = mean_and_variance(masked_moments(doubles(2, 2), torch.ones(2)))
    assert z_score(doubles(2, 2), mean=mean, variance=variance).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_references_by_a_loop(seed):
    draw = random.Random(seed)
    scores = [draw.gauss(0, 2) for _ in range(6)]
    references = [[draw.gauss(0, 2) for _ in range(draw.randint(0, 4))] for _ in scores]
    grid = doubles(*[own + [NAN] * (4 - len(own)) for own in references])
    bounded, centred = (
        par(doubles(*scores), grid, scale=1.5),
        center_reference(doubles(*scores), grid),
    )
    for i, (score, own) in enumerate(zip(scores, references, strict=True)):
        if not own:
            assert bounded[i].isnan()
            assert centred[i].isnan()
            continue
        expected = sum(sigmoid(1.5 * (score - r)) for r in own) / len(own)
        assert bounded[i].item() == pytest.approx(expected, abs=1e-9)
        expected = sigmoid(score - sum(own) / len(own))
        assert centred[i].item() == pytest.approx(expected, abs=1e-9)


def test_one_reference_makes_par_and_the_calibration_one():
    scores, references = torch.randn(5).double(), torch.randn(5, 1).double()
    assert torch.equal(par(scores, references), center_reference(scores, references))


def test_a_score_shrinks_with_the_divergence_as_in_cgpo():
    """r 2 .5 1 against 1, KL 1 2 6 of at most 5, all constraints held; then less the mean."""
    calibrated = center_reference(doubles(2, 0.5, 1), doubles(1, 1, 1)[:, None])
    found = within_kl(calibrated, doubles(1, 2, 6), longest=5)
    assert found.tolist() == pytest.approx([0.584847, 0.226524, 0], abs=1e-6)
    centred = [0.314390, -0.043933, -0.270457]
    assert (found - found.mean()).tolist() == pytest.approx(centred, abs=1e-6)
