"""The estimator of the configuration on a replica's samples: groups, whitening, targets."""

from typing import get_args

import pytest
import torch

from marlhf_mega.algorithm.choices import Estimator
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.experience.estimation import estimate_advantages
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

MASK = torch.arange(3) < torch.tensor([3, 1, 2, 2])[:, None]
SCORES = torch.tensor([1.0, 4.0, 2.0, 5.0])


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def estimate(
    mesh, *, indices=(0, 1, 2, 3), mask=MASK, baselines=None, critic=False, learned=None, **ppo
):
    config = Config.model_validate(
        {
            "ppo": {"whiten_advantages": False} | ppo,
            "macro": {"rule": "token"},
            "rollout": {"batch_size": 4, "samples_per_prompt": 2},
        }
    )
    rewards = torch.zeros(4, 3)
    rewards[range(4), MASK.sum(1) - 1] = SCORES
    return estimate_advantages(
        rewards * mask,
        MacroActions.from_starts(mask, mask),
        config,
        mesh,
        values=torch.full((4, 3), 0.5) * mask if critic else None,
        baselines=baselines,
        sample_indices=indices,
        learned=learned,
    )


def levels(found):
    return found.advantages[:, 0].tolist()


def test_responses_to_a_prompt_are_compared_wherever_they_are(mesh):
    found = estimate(mesh, estimator="rloo")
    assert levels(found) == [-3, 3, -3, 3]
    assert torch.equal(found.advantages, found.advantages[:, :1] * MASK)
    # Rows 0 and 2 answer one prompt, rows 1 and 3 the other: a balanced batch has any order.
    assert levels(estimate(mesh, estimator="rloo", indices=(1, 3, 0, 2))) == [-1, -1, 1, 1]


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"])
def test_a_response_whose_group_failed_has_nothing_to_be_compared_with(mesh, estimator):
    mask = MASK & torch.tensor([True, False, True, True])[:, None]
    found = levels(estimate(mesh, estimator=estimator, mask=mask))
    assert found[:2] == [0, 0]
    assert found[2] == -found[3] < 0


def test_returns_to_go_less_the_score_of_the_greedy_response(mesh):
    assert levels(estimate(mesh, estimator="reinforce_pp")) == SCORES.tolist()
    baselines = torch.tensor([1.0, 1.0, 0.5, 6.0])
    found = estimate(mesh, estimator="remax", baselines=baselines)
    assert levels(found) == (SCORES - baselines).tolist()
    assert not found.advantages[~MASK].any()


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_whitened_advantages_have_no_mean_over_tokens(mesh, estimator):
    critic = estimator in ("gae", "sae")
    found = estimate(
        mesh,
        estimator=estimator,
        critic=critic or estimator == "vine",
        baselines=torch.zeros(4) if estimator == "remax" else None,
        whiten_advantages=True,
    )
    tokens = found.advantages[MASK]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.std().item() == pytest.approx(1, abs=1e-5)
    assert not found.advantages[~MASK].any()
    assert (found.returns is None) == (not critic)


@pytest.mark.parametrize("aggregation", ["token_mean", "macro_mean"])
def test_what_the_policy_does_not_learn_from_is_not_in_the_moments(mesh, aggregation):
    learned = MASK.clone()
    learned[0, 1:] = learned[3, 0] = False
    found = estimate(
        mesh,
        estimator="reinforce_pp",
        whiten_advantages=True,
        learned=learned,
        aggregation=aggregation,
    )
    tokens = found.advantages[learned]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.std().item() == pytest.approx(1, abs=1e-5)


def test_sae_with_actions_of_one_token_is_gae(mesh):
    sae, gae = (estimate(mesh, estimator=name, critic=True) for name in ("sae", "gae"))
    torch.testing.assert_close(sae.advantages, gae.advantages)
    torch.testing.assert_close(sae.returns, gae.returns)


def test_the_policys_lambda_can_grow_with_the_response(mesh):
    """Of 3 tokens lambda is 1 - 1 / (0.5 * 3) = 1/3, of up to 2 it is 0; the critic's stays 1."""
    found = estimate(mesh, critic=True, gae_lambda_alpha=0.5, gae_lambda_critic=1.0)
    # Errors of the three tokens are 0, 0 and 0.5.
    assert found.advantages[0].tolist() == pytest.approx([0.5 / 9, 0.5 / 3, 0.5])
    assert found.advantages[2].tolist() == pytest.approx([0, 1.5, 0])
    torch.testing.assert_close(found.returns, SCORES[:, None] * MASK)
