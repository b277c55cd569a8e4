import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.advantages import (
    adaptive_lambda,
    macro_advantages,
    reverse_scan,
    segment_advantages,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.termination import fixed_ngram, probability, whole_response
from tests.unit.algorithm.macro_oracles import lengths_of, macro_gae, masks, noise, responses

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


LOW = [0.9, 0.8, 0.7, 0.1, 0.9, 0.95, 0.15]
"""Probabilities of the worked example's tokens."""


def worked_sae(starts, *, gae_lambda=0.95, kl=0.0, critic_lambda=None):
    """The response of 7 tokens of the specification, with a critic's values .1 to .7."""
    mask = torch.ones(1, 7, dtype=torch.bool)
    rewards = torch.arange(1, 8, dtype=torch.float64).unsqueeze(0) * -kl
    rewards[0, -1] += 1.0
    return segment_advantages(
        rewards,
        torch.arange(1, 8, dtype=torch.float64).unsqueeze(0) * 0.1,
        MacroActions.from_starts(starts, mask),
        gamma=1.0,
        gae_lambda=gae_lambda,
        critic_lambda=critic_lambda,
    )


def unlikely():
    mask = torch.ones(1, 7, dtype=torch.bool)
    return probability(mask, torch.tensor([LOW], dtype=torch.float64).log(), below=0.2)


def test_worked_segment_advantages():
    found = worked_sae(unlikely())
    assert close(found.token_advantages, [0.85575, 0.75575, 0.65575, 0.585, 0.485, 0.385, 0.3])
    with_kl = worked_sae(unlikely(), kl=0.01)
    expected = [0.590075, 0.500075, 0.420075, 0.3685, 0.3085, 0.2585, 0.23]
    assert close(with_kl.token_advantages, expected)


def test_segment_advantages_with_actions_of_one_token_or_one_action():
    mask = torch.ones(1, 7, dtype=torch.bool)
    expected = [0.750344, 0.684572, 0.615339, 0.542462, 0.465750, 0.385, 0.3]
    each = worked_sae(mask).token_advantages[0].tolist()
    assert each == pytest.approx(expected, abs=5e-7)
    assert close(
        worked_sae(whole_response(mask)).token_advantages, [0.9 - 0.1 * t for t in range(6)] + [0.3]
    )


def test_the_critic_has_a_lambda_of_its_own():
    starts = unlikely()
    found = worked_sae(starts, critic_lambda=1.0)
    assert close(found.token_advantages, worked_sae(starts).token_advantages[0].tolist())
    assert close(found.token_returns, [1.0] * 7)
    mask = torch.ones(1, 7, dtype=torch.bool)
    rewards, values = noise(1, 1, 7), noise(2, 1, 7)
    rest = {"value_rule": "equal", "macro_reward": "sum", "gamma": 0.9}
    actions = MacroActions.from_starts(fixed_ngram(mask, n=2), mask)
    both = macro_advantages(rewards, values, actions, **rest, gae_lambda=0.3, critic_lambda=0.8)
    policy, critic = (
        macro_advantages(rewards, values, actions, **rest, gae_lambda=each) for each in (0.3, 0.8)
    )
    assert torch.equal(both.advantages, policy.advantages)
    assert torch.equal(both.returns, critic.returns)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(10, 0.0), (20, 0.0), (40, 0.5), (100, 0.8), (719, 1 - 1 / 35.95), (2000, 0.99)],
)
def test_worked_adaptive_lambda(length, expected):
    mask = torch.ones(1, length, dtype=torch.bool)
    actions = MacroActions.from_starts(fixed_ngram(mask, n=2), mask)
    found = adaptive_lambda(actions, alpha=0.05, unit="per_token")
    assert found.tolist() == [[pytest.approx(expected, abs=1e-12)]]
    by_action = adaptive_lambda(actions, alpha=0.1, unit="per_macro")
    assert by_action.item() == pytest.approx(1 - 1 / (0.1 * -(-length // 2)) if length > 20 else 0)


@given(responses(max_tokens=12), st.sampled_from(["per_macro", "per_token"]), st.booleans())
def test_segment_advantages_agree_with_loops_in_both_layouts(rows, discount, adaptive):
    starts, mask = masks(rows)
    assume(mask.any())
    rewards, values = noise(1, *mask.shape), noise(2, *mask.shape)
    actions = MacroActions.from_starts(starts, mask)
    lam = adaptive_lambda(actions, alpha=0.7, unit="per_macro") if adaptive else 0.8
    options = {"gamma": 0.9, "gae_lambda": lam, "discount": discount}
    found = segment_advantages(rewards, values, actions, **options)
    packed = segment_advantages(rewards[mask], values[mask], actions.pack(), **options)
    for row, flags in enumerate(rows):
        decay = max(1 - 1 / (0.7 * max(sum(flags), 1)), 0) if adaptive else 0.8
        after, next_value, expected = 0.0, 0.0, []
        for t in reversed(range(len(flags))):
            is_last = t + 1 == len(flags) or flags[t + 1]
            gamma = 0.9 if is_last or discount == "per_token" else 1.0
            delta = rewards[row, t].item() + gamma * next_value - values[row, t].item()
            after = delta + gamma * (decay if is_last else 1.0) * after
            next_value = values[row, t].item()
            expected.insert(0, after)
        assert found.token_advantages[row, : len(flags)].tolist() == pytest.approx(expected)
        returns = [a + v for a, v in zip(expected, values[row].tolist(), strict=False)]
        assert found.token_returns[row, : len(flags)].tolist() == pytest.approx(returns)
    assert not found.token_advantages[~mask].any()
    assert torch.equal(packed.token_advantages, found.token_advantages[mask])


@given(responses(min_tokens=1))
def test_segment_advantages_start_like_macro_gae_with_the_value_of_the_first_token(rows):
    starts, mask = masks(rows)
    rewards, values = noise(1, *mask.shape), noise(2, *mask.shape)
    actions = MacroActions.from_starts(starts, mask)
    found = segment_advantages(rewards, values, actions, gamma=1.0, gae_lambda=0.8)
    macro = macro_advantages(
        rewards,
        values,
        actions,
        value_rule="first",
        macro_reward="sum",
        gamma=1.0,
        gae_lambda=0.8,
    )
    torch.testing.assert_close(found.token_advantages[starts], macro.token_advantages[starts])
