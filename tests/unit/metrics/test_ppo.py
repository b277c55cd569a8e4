"""Metrics of a PPO step from small tensors, by hand; two replicas give what one would."""

import pytest
import torch

from marlhf_mega.metrics.ppo import (
    add_advantages,
    add_kept,
    add_logprobs,
    add_macro_actions,
    add_rollout,
    add_values,
    finish,
    step_sums,
)
from marlhf_mega.metrics.reduce import reduce_metrics

NAN = float("nan")


def alone(sums):
    return reduce_metrics(sums, lambda vector: vector, lambda vector: vector)


def test_scores_without_a_number_count_as_invalid_only():
    sums = step_sums()
    add_rollout(
        sums,
        scores=torch.tensor([1.0, NAN, 4.0]),
        response_lengths=[2, 5, 8],
        finished=[True, True, False],
    )
    found = finish(alone(sums))
    assert found["rollout/score_mean"] == 2.5
    assert found["rollout/score_std"] == 1.5  # of the population: (1.5^2 + 1.5^2) / 2
    assert found["rollout/response_tokens"] == 5.0
    assert found["rollout/truncated_fraction"] == pytest.approx(1 / 3)
    assert found["rollout/invalid_fraction"] == pytest.approx(1 / 3)
    assert "critic/explained_variance" not in found


def test_divergence_is_a_sum_over_tokens_and_the_gap_a_mean_over_them():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 7.0]])
    sums = step_sums()
    add_logprobs(
        sums,
        logprobs=logprobs,
        sampled_logprobs=torch.tensor([[-1.0, -2.5], [-2.0, 0.0]]),
        # The divergence is between the distributions before the sampler's filters.
        full_logprobs=logprobs - 0.25,
        ref_logprobs=torch.tensor([[-1.5, -2.0], [-4.0, 0.0]]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, 99.0]]),
        mask=mask,
    )
    add_macro_actions(sums, lengths=torch.tensor([[2, 0], [1, 0]]), mask=mask, num_fallbacks=1)
    found = finish(alone(sums))
    assert found["policy/kl"] == pytest.approx((0.5 + 1.0 - 3 * 0.25) / 2)
    assert found["policy/entropy"] == 2.0
    assert found["rollout/logprob_gap"] == pytest.approx((0.5 + 1.0) / 3)
    assert found["rollout/logprob_gap_max"] == 1.0
    assert found["macro/actions_per_response"] == 1.0
    assert found["macro/tokens_per_action"] == 1.5
    assert found["macro/fallback_fraction"] == 0.5


def test_the_probability_of_what_filters_keep_is_that_of_a_token_before_over_after():
    sums = step_sums()
    add_kept(
        sums,
        logprobs=torch.tensor([[0.5, 0.2], [0.4, 1.0]]).log(),
        full_logprobs=torch.tensor([[0.25, 0.2], [0.3, 0.1]]).log(),
        mask=torch.tensor([[True, True], [True, False]]),
    )
    assert finish(alone(sums))["rollout/kept_probability"] == pytest.approx((0.5 + 1 + 0.75) / 3)


def test_the_spread_of_advantages_is_over_the_tokens_that_count():
    sums = step_sums()
    mask = torch.tensor([[True, True], [True, False]])
    add_advantages(sums, advantages=torch.tensor([[1.0, 2.0], [6.0, 50.0]]), mask=mask)
    found = finish(alone(sums))
    assert found["policy/advantage_std"] == pytest.approx((14 / 3) ** 0.5)  # (4 + 1 + 9) / 3
    assert "policy/advantage_mean" not in found


def test_explained_variance_of_two_replicas_is_that_of_all_their_tokens():
    returns = torch.tensor([[1.0, 2.0, 5.0], [0.0, -4.0, 3.0]])
    values = torch.tensor([[0.5, 2.5, 3.0], [0.0, -2.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    parts = []
    for row in range(2):
        sums = step_sums()
        one = slice(row, row + 1)
        add_values(sums, values=values[one], returns=returns[one], mask=mask[one])
        parts.append(sums)
    vectors = [sums.pack()[0] for sums in parts]
    found = finish(parts[0].unpack(vectors[0] + vectors[1], parts[0].pack()[1]))
    kept, left = returns[mask].double(), (returns - values)[mask].double()
    explained = 1 - left.var(unbiased=False) / kept.var(unbiased=False)
    assert found["critic/explained_variance"] == pytest.approx(explained.item())
    assert found["critic/return_mean"] == pytest.approx(0.8)
    named = {name for name in found if "work" not in name}
    assert named == {"critic/return_mean", "critic/explained_variance"}
