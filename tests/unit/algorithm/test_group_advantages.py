"""Advantages without a critic against worked numbers and loops."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.group_advantages import (
    group_centred,
    group_normalised,
    leave_one_out,
    posterior_weights,
    returns_to_go,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.masked import masked_moments, mean_and_variance, whiten
from marlhf_mega.algorithm.termination import whole_response
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses

RETURNS = torch.tensor([1.0, 0.0, 0.5, 0.8], dtype=torch.float64)
LENGTHS = [2, 4, 3, 1]
ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (leave_one_out, [0.566667, -0.766667, -0.1, 0.3]),
        (group_centred, [0.425, -0.575, -0.075, 0.225]),
        (group_normalised, [0.977160, -1.322040, -0.172440, 0.517320]),
    ],
)
def test_worked_groups(estimator, expected):
    found = estimator(RETURNS, ALL, samples_per_prompt=4)
    assert found.tolist() == pytest.approx(expected, abs=5e-7)


def test_worked_brain():
    """log p -5 -6 -7, prior -5.2 -5.9 -7.1, q -5.1 -6 -6.8, r 1 2 0, beta 1."""
    returns = torch.tensor([1 - 0.2, 2 + 0.1, 0 - 0.1], dtype=torch.float64)
    ratios = torch.tensor([0.1, 0.0, -0.2], dtype=torch.float64)
    valid = torch.ones(3, dtype=torch.bool)
    found = posterior_weights(returns, valid, samples_per_prompt=3, log_ratios=ratios, beta=1.0)
    assert found.tolist() == pytest.approx([-0.161589, 0.376427, -0.214838], abs=5e-7)
    exact = [math.exp(x) for x in (0.9, 2.1, -0.3)], [math.exp(x) for x in (0.1, 0.0, -0.2)]
    expected = [a / sum(exact[0]) - b / sum(exact[1]) for a, b in zip(*exact, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_brain_compares_those_with_a_score_and_leaves_one_alone():
    """Two groups of three: without the second of each, and without a second and a third."""
    valid = torch.tensor([True, False, True, True, False, False])
    returns = torch.tensor([1.0, 9.0, 0.5, 3.0, 9.0, 9.0], dtype=torch.float64)
    ratios = torch.tensor([0.2, 5.0, -0.1, 0.7, 5.0, 5.0], dtype=torch.float64)
    found = posterior_weights(returns, valid, samples_per_prompt=3, log_ratios=ratios, beta=0.5)
    a, b = math.exp(2.2), math.exp(0.9)
    p, q = math.exp(0.2), math.exp(-0.1)
    first = a / (a + b) - p / (p + q)
    assert found.tolist() == pytest.approx([first, 0, -first, 0, 0, 0], abs=1e-9)


def test_worked_reinforce_plus_plus():
    """Whitened over tokens, with one prompt the baseline of the group makes no difference."""
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    expected = [1.377510, -1.039174, 0.169168, 0.894173]
    rewards = torch.zeros(4, 4, dtype=torch.float64)
    rewards[range(4), [n - 1 for n in LENGTHS]] = RETURNS
    actions = MacroActions.from_starts(mask, mask)
    to_go = returns_to_go(
        rewards,
        actions,
        value_rule="equal",
        macro_reward="sum",
        gamma=1.0,
        discount="per_macro",
    )
    centred = group_centred(RETURNS, ALL, samples_per_prompt=4)[:, None].expand(4, 4)
    for advantages in (to_go, centred):
        moments = masked_moments(advantages, actions.lengths)
        mean, variance = mean_and_variance(moments)
        white = whiten(advantages, actions.lengths, mean=mean, variance=variance)
        assert white[:, 0].tolist() == pytest.approx(expected, abs=5e-7)


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=24),
    st.integers(1, 4),
)
def test_groups_agree_with_loops_over_the_samples_that_count(samples, size):
    samples = samples + [(0.5, True)] * (-len(samples) % size)
    returns = torch.tensor([r for r, _ in samples], dtype=torch.float64)
    valid = torch.tensor([v for _, v in samples])
    found = {
        each: each(returns, valid, samples_per_prompt=size).tolist()
        for each in (leave_one_out, group_centred, group_normalised)
    }
    for i, (own, counts) in enumerate(samples):
        first = i // size * size
        group = [r for r, v in samples[first : first + size] if v]
        if not counts or len(group) < 2:
            assert all(values[i] == 0 for values in found.values())
            continue
        mean, others = statistics.fmean(group), (sum(group) - own) / (len(group) - 1)
        assert found[leave_one_out][i] == pytest.approx(own - others, abs=1e-9)
        assert found[group_centred][i] == pytest.approx(own - mean, abs=1e-9)
        std = statistics.stdev(group)
        assert found[group_normalised][i] == pytest.approx((own - mean) / (std + 1e-6), abs=1e-6)


def test_a_failed_sample_may_hold_anything():
    returns = torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64)
    valid = torch.tensor([True, False, True])
    found = leave_one_out(returns, valid, samples_per_prompt=3)
    assert found.tolist() == [-2.0, 0.0, 2.0]


@given(responses(max_tokens=10), st.sampled_from(["per_macro", "per_token"]))
def test_returns_to_go_agree_with_a_loop(rows, discount):
    starts, mask = masks(rows)
    assume(mask.any())
    rewards = noise(1, *mask.shape) * mask
    baselines = noise(2, len(rows))
    actions = MacroActions.from_starts(starts, mask)
    found = returns_to_go(
        rewards,
        actions,
        baselines=baselines,
        value_rule="equal",
        macro_reward="sum",
        gamma=0.9,
        discount=discount,
    )
    for row, flags in enumerate(rows):
        lengths = lengths_of(flags) if flags else []
        expected = []
        for k in range(len(lengths)):
            total, first = 0.0, sum(lengths[:k])
            for t in range(first, len(flags)):
                steps = t - first
                if discount == "per_macro":
                    steps = sum(flags[first + 1 : t + 1])
                total += 0.9**steps * rewards[row, t].item()
            expected.append(total - baselines[row].item())
        assert found[row, : len(lengths)].tolist() == pytest.approx(expected)
        assert not found[row, len(lengths) :].any()


def test_the_return_of_one_action_is_the_sum_of_its_rewards():
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = torch.tensor([[-0.1, -0.2, 1.0]], dtype=torch.float64)
    found = returns_to_go(
        rewards,
        MacroActions.from_starts(whole_response(mask), mask),
        baselines=torch.tensor([0.4], dtype=torch.float64),
        value_rule="equal",
        macro_reward="sum",
        gamma=1.0,
        discount="per_macro",
    )
    assert found.tolist() == [[pytest.approx(0.3)]]
