import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from macro_oracles import lengths_of, macro_gae, masks, noise, responses

from marlhf_mega.algorithm.advantages import (
    group_normalised,
    leave_one_out,
    macro_advantages,
    reverse_scan,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.termination import fixed_ngram, whole_response

VALUE_RULES = ["equal", "unit", "first", "position", "position_repo"]


def worked(n, *, reward, compat="none"):
    """The response of 7 tokens that the specification works out by hand."""
    mask = torch.ones(1, 7, dtype=torch.bool)
    rewards = torch.arange(1, 8, dtype=torch.float64).unsqueeze(0) * -0.01
    rewards[0, -1] += 1.0
    return macro_advantages(
        rewards,
        torch.arange(1, 8, dtype=torch.float64).unsqueeze(0) * 0.1,
        MacroActions.from_starts(fixed_ngram(mask, n=n), mask, compat=compat),
        value_rule="equal",
        macro_reward=reward,
        gamma=1.0,
        gae_lambda=0.95,
    )


def close(found, expected):
    return found[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_worked_fixed_trigrams():
    found = worked(3, reward="sum")
    assert close(found.values, [0.2, 0.5, 0.7])
    assert close(found.rewards, [-0.06, -0.15, 0.93])
    assert close(found.advantages, [0.495075, 0.2685, 0.23])
    assert close(found.returns, [0.695075, 0.7685, 0.93])
    assert close(found.token_advantages, [0.495075] * 3 + [0.2685] * 3 + [0.23])
    assert close(found.token_returns, [0.695075] * 3 + [0.7685] * 3 + [0.93])


def test_worked_compat_with_an_empty_action():
    found = worked(3, reward="mean", compat="ma_rlhf")
    assert close(found.values, [0.2, 0.5, 0.0, 0.7])
    assert close(found.rewards, [-0.02, -0.05, 0.0, 0.93])
    assert close(found.advantages, [0.58644625, 0.322575, 0.9185, 0.23])
    assert close(found.returns, [0.78644625, 0.822575, 0.9185, 0.93])
    assert close(found.token_advantages, [0.58644625] * 3 + [0.322575] * 3 + [0.23])


def test_worked_compat_without_one():
    found = worked(4, reward="mean", compat="ma_rlhf")
    assert close(found.values, [0.25, 0.55, 0.7])
    assert close(found.rewards, [-0.025, -0.055, 0.93])
    assert close(found.advantages, [0.572825, 0.3135, 0.23])


def test_worked_token_ppo():
    expected = [0.521365, 0.454069, 0.393756, 0.340796, 0.295575, 0.2585, 0.23]
    assert worked(1, reward="sum").advantages[0].tolist() == pytest.approx(expected, abs=5e-7)


@given(
    responses(max_tokens=20),
    st.sampled_from(VALUE_RULES),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from(["per_macro", "per_token"]),
    st.sampled_from(["per_macro", "per_token"]),
)
def test_advantages_agree_with_loops_in_both_layouts(rows, rule, reward, discount, lambda_unit):
    starts, mask = masks(rows)
    assume(mask.any())
    rewards, values = noise(1, *mask.shape), noise(2, *mask.shape)
    options = {
        "value_rule": rule,
        "macro_reward": reward,
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "discount": discount,
        "lambda_unit": lambda_unit,
    }
    actions = MacroActions.from_starts(starts, mask)
    found = macro_advantages(rewards, values, actions, **options)
    packed = macro_advantages(rewards[mask], values[mask], actions.pack(), **options)
    for row, flags in enumerate(rows):
        lengths = lengths_of(flags)
        expected = macro_gae(
            rewards[row].tolist(),
            values[row].tolist(),
            lengths,
            rule=rule,
            reward=reward,
            gamma=0.9,
            lam=0.8,
            per_token=discount == "per_token",
            lambda_per_token=lambda_unit == "per_token",
        )
        grids = (found.values, found.rewards, found.advantages, found.returns)
        for grid, numbers in zip(grids, expected, strict=True):
            assert grid[row, : len(lengths)].tolist() == pytest.approx(numbers, abs=1e-10)
            assert not grid[row, len(lengths) :].any()
    assert torch.equal(packed.advantages, found.advantages)
    assert torch.equal(packed.token_advantages, found.token_advantages[mask])
    assert torch.equal(packed.token_returns, found.token_returns[mask])


@given(responses(min_tokens=1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_batch_order_and_padding_change_no_bit(rows, extra, random):
    starts, mask = masks(rows)
    rewards, values = noise(1, *mask.shape), noise(2, *mask.shape)

    def advantages(order, width):
        def arrange(tensor):
            return torch.nn.functional.pad(tensor[order], (0, width))

        found = macro_advantages(
            arrange(rewards),
            arrange(values),
            MacroActions.from_starts(arrange(starts), arrange(mask)),
            value_rule="position",
            macro_reward="sum",
            gamma=0.99,
            gae_lambda=0.95,
        )
        return found.token_advantages[:, : mask.size(1)]

    order = random.sample(range(len(rows)), len(rows))
    assert torch.equal(advantages(order, extra), advantages(range(len(rows)), 0)[order])


@given(responses(min_tokens=1))
def test_limits(rows):
    starts, mask = masks(rows)
    rewards = noise(1, *mask.shape) * mask
    values = noise(2, *mask.shape) * mask

    def advantages(flags):
        return macro_advantages(
            rewards,
            values,
            MacroActions.from_starts(flags, mask),
            value_rule="equal",
            macro_reward="sum",
            gamma=1.0,
            gae_lambda=0.95,
        )

    # One action per response: REINFORCE with a learned baseline.
    whole = advantages(whole_response(mask))
    torch.testing.assert_close(whole.returns[:, 0], rewards.sum(1))
    baseline = values.sum(1) / mask.sum(1)
    torch.testing.assert_close(whole.advantages[:, 0], rewards.sum(1) - baseline)
    # Any segmentation: no reward is lost, and the advantage is constant inside an action.
    found = advantages(starts)
    torch.testing.assert_close(found.rewards.sum(1), rewards.sum(1))
    same_action = ~starts[:, 1:] & mask[:, 1:]
    steps = found.token_advantages.diff(dim=1)
    assert not steps[same_action].any()


@given(st.integers(1, 70), st.integers(0, 100))
def test_reverse_scan_solves_the_recurrence(length, seed):
    terms, factors = noise(seed, 2, length), noise(seed + 1, 2, length)
    expected, after = [], torch.zeros(2, dtype=torch.float64)
    for k in reversed(range(length)):
        after = terms[:, k] + factors[:, k] * after
        expected.insert(0, after)
    torch.testing.assert_close(reverse_scan(terms, factors), torch.stack(expected, 1))


def test_advantages_without_a_critic():
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    found = leave_one_out(scores, samples_per_prompt=3)
    assert found.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    found = group_normalised(scores, samples_per_prompt=3)
    std = 7**0.5  # distances -2, -1, 3
    assert found.tolist() == pytest.approx([-2 / std, -1 / std, 3 / std, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("estimator", [leave_one_out, group_normalised])
def test_one_response_per_prompt_has_nothing_to_compare_with(estimator):
    with pytest.raises(ValueError, match=r"^rollout\.samples_per_prompt=1: must be at least 2"):
        estimator(torch.zeros(4), samples_per_prompt=1)
