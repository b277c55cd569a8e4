"""Filters of rollouts: hand-worked choices, frequencies, and a loop on random scores."""

import random

import pytest
import torch

from marlhf_mega.algorithm.filters import (
    best_of_n,
    best_random,
    best_worst,
    has_spread,
    power_probabilities,
    power_resample,
)

INF = float("inf")


def scored(*values):
    """Return scores and which are valid; None has no score."""
    scores = torch.tensor([0.0 if v is None else v for v in values], dtype=torch.float64)
    return scores, torch.tensor([v is not None for v in values])


def test_probabilities_by_hand():
    found = power_probabilities(*scored(2.0, -1.0, 0.5), power=2.0)
    assert found.tolist() == pytest.approx([16 / 21, 4 / 21, 1 / 21], abs=1e-9)
    assert found.tolist() == pytest.approx([0.761905, 0.190476, 0.047619], abs=1e-6)
    assert power_probabilities(*scored(2.0, None, -1.0), power=1.0).tolist() == pytest.approx(
        [2 / 3, 0, 1 / 3], abs=1e-9
    )


def test_scores_of_zero_are_drawn_alike_and_so_is_a_batch_without_any_score():
    assert power_probabilities(*scored(0.0, None, 0.0), power=2.0).tolist() == [0.5, 0, 0.5]
    assert power_probabilities(*scored(None, None), power=2.0).tolist() == [0.5, 0.5]


def test_draws_have_these_probabilities_and_repeat_by_seed_and_step():
    judged = scored(*[2.0, None, -1.0, 0.5] * 5000)
    drawn = power_resample(*judged, power=2.0, seed=1, step=2)
    share = torch.bincount(drawn % 4, minlength=4) / len(drawn)
    # Four standard deviations of a share of 20,000 draws are at most 0.014.
    assert share.tolist() == pytest.approx([16 / 21, 0, 4 / 21, 1 / 21], abs=0.014)
    assert torch.equal(drawn, power_resample(*judged, power=2.0, seed=1, step=2))
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(drawn, power_resample(*judged, power=2.0, **other))


def test_the_last_sample_without_a_score_is_never_drawn():
    drawn = power_resample(*scored(*[1.0, None] * 500), power=1.0, seed=0, step=0)
    assert (drawn % 2 == 0).all()


def test_choices_by_hand():
    judged = scored(1.0, 3.0, 2.0, 5.0, None, 4.0)
    assert best_of_n(*judged, samples_per_prompt=3).tolist() == [1, 3]
    assert best_worst(*judged, samples_per_prompt=3).tolist() == [1, 0, 3, 5]
    assert has_spread(*judged, samples_per_prompt=3).tolist() == [True, True]
    # The only one with a score has no other of its prompt beside it that counts.
    assert best_worst(*scored(None, 1.0, None), samples_per_prompt=3).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0, 1.0), False), ((1.0, 1.5), True), ((1.0, None), False), ((None, None), False)],
)
def test_alike_are_responses_with_the_same_score(values, expected):
    assert has_spread(*scored(*values), samples_per_prompt=2).tolist() == [expected]


def test_the_other_of_best_random_is_any_of_the_others_alike():
    judged = scored(*[1.0, 4.0, None, 2.0, 3.0] * 3000)
    found = best_random(*judged, samples_per_prompt=5, seed=3, step=1).view(-1, 2) % 5
    assert (found[:, 0] == 1).all()
    share = torch.bincount(found[:, 1], minlength=5) / 3000
    # Four standard deviations are 0.035.
    assert share.tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3, 1 / 3], abs=0.035)


def test_a_loop_over_random_scores_chooses_the_same():
    draw = random.Random(5)
    for samples in (2, 3, 5):
        values = [draw.choice([None, 0.0, 1.0, draw.gauss(0, 1)]) for _ in range(40 * samples)]
        judged = scored(*values)
        best, pairs, others, spread = [], [], [], []
        for start in range(0, len(values), samples):
            group = range(start, start + samples)
            # Of equals the first comes first.
            ranked = sorted(group, key=lambda i: (INF if values[i] is None else -values[i], i))
            valid = [i for i in ranked if values[i] is not None]
            best.append(ranked[0])
            pairs += [ranked[0], valid[-1] if len(valid) > 1 else ranked[1]]
            others.append(set(valid[1:]) if len(valid) > 1 else {ranked[1]})
            spread.append(len({values[i] for i in valid}) > 1)
        options = {"samples_per_prompt": samples}
        assert best_of_n(*judged, **options).tolist() == best
        assert best_worst(*judged, **options).tolist() == pairs
        assert has_spread(*judged, **options).tolist() == spread
        found = best_random(*judged, **options, seed=0, step=0).view(-1, 2).tolist()
        assert [pair[0] for pair in found] == best
        assert all(pair[1] in allowed for pair, allowed in zip(found, others, strict=True))
