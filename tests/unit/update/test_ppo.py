"""The policy's objective from its three terms, by hand; fillers count nowhere."""

import math

import pytest
import torch

from marlhf_mega.algorithm.macro_actions import NO_ACTION, MacroActions
from marlhf_mega.algorithm.policy_losses import unlikely_tokens
from marlhf_mega.algorithm.termination import probability
from marlhf_mega.config.schema import Config
from marlhf_mega.experience.types import Experience
from marlhf_mega.update.ppo import (
    PpoMicrobatch,
    critic_objective,
    make_microbatches,
    policy_objective,
)
from tests.unit.models.meshes import mesh
from tests.unit.update.three_responses import PROMPTS, RESPONSES, logprobs_of, total


def test_the_objective_is_the_sum_of_its_terms_and_each_is_reported():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    actions = MacroActions.from_starts(mask, mask)
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 0.5], [0.25, 0.5, 0.5]]))
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    nothing = torch.zeros(2, 3)
    microbatch = PpoMicrobatch(
        batch=None,
        actions=actions,
        old_logprobs=logprobs,
        # k2: half of the squared difference, which is 0.4 at every token.
        ref_logprobs=logprobs - 0.4,
        old_values=nothing,
        advantages=torch.tensor([[1.0, 1.0, 2.0], [-3.0, 0.0, 0.0]]),
        returns=nothing,
    )
    both = {"kl_loss_coef": 0.5, "entropy_coef": 0.1}
    config = Config.model_validate({"ppo": both, "macro": {"rule": "token"}})
    loss = policy_objective(torch.stack([logprobs, entropy]), microbatch, config=config)
    terms = {name: float(total) / float(count) for name, (total, count) in loss.metrics.items()}
    assert float(loss.count) == 4
    assert terms["kl_loss"] == pytest.approx(0.4**2 / 2)
    assert terms["entropy_loss"] == pytest.approx(-(1 + 2 + 3 + 4) / 4)
    # The ratio is 1, so the surrogate is the negative mean advantage.
    surrogate = -(1 + 1 + 2 - 3) / 4
    assert float(loss.loss_sum) / 4 == pytest.approx(surrogate + 0.5 * 0.08 - 0.1 * 2.5)
    alone = Config.model_validate({"macro": {"rule": "token"}})
    plain = policy_objective(torch.stack([logprobs, entropy]), microbatch, config=alone)
    assert not {"kl_loss", "entropy_loss"} & set(plain.metrics)


@pytest.mark.parametrize("objective", [policy_objective, critic_objective])
def test_a_sum_over_a_budget_is_divided_by_it_once(objective):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    grid = torch.tensor([[0.5, 0.25, 0.5], [0.25, 0.0, 0.0]])
    microbatch = PpoMicrobatch(
        batch=None,
        actions=MacroActions.from_starts(mask, mask),
        old_logprobs=grid,
        ref_logprobs=grid - 0.4,
        old_values=grid,
        advantages=grid,
        returns=grid + 1,
    )
    output = torch.stack([grid, grid]) if objective is policy_objective else grid
    found = []
    for aggregation in ("seq_mean_token_sum", "seq_sum_const"):
        ppo = {"aggregation": aggregation, "kl_loss_coef": 0.5, "entropy_coef": 0.1}
        rollout = {"max_response_tokens": 7}
        found.append(
            objective(
                output, microbatch, config=Config.model_validate({"ppo": ppo, "rollout": rollout})
            )
        )
    plain, divided = found
    assert divided.loss_sum == plain.loss_sum != 0
    assert (plain.count.item(), divided.count.item()) == (2, 14)
    assert {count.item() for _, count in divided.metrics.values()} == {14}


def test_the_policy_learns_from_some_tokens_and_the_critic_from_all():
    """SPO's example: all but tokens 1, 3 and 5 are nearly certain."""
    actions, logprobs, learned = spo()
    advantages = torch.tensor([[0.0, 2, 2, 2, 2, 3, 3]]) / 9
    experience = Experience(
        prompts=[[1]],
        responses=[[5] * 7],
        actions=actions,
        learned=MacroActions.from_ids(actions.ids.where(learned, NO_ACTION)),
        old_logprobs=logprobs,
        ref_logprobs=None,
        old_values=torch.zeros(1, 7),
        advantages=advantages,
        returns=torch.ones(1, 7),
    )
    config = Config.model_validate({"macro": {"ratio": "macro_geo"}})
    (part,) = make_microbatches(experience, torch.arange(1), config, mesh(1))
    output = torch.stack([logprobs, torch.zeros(1, 7)])
    policy = policy_objective(output, part, config=config)
    assert (policy.loss_sum / policy.count).item() == pytest.approx(-(2 + 2 + 3) / 9 / 3)
    assert policy.count == 3
    critic = critic_objective(torch.zeros(1, 7), part, config=config)
    assert critic.count == 7


def spo():
    """Actions, log-probs and the tokens that count: probabilities of methods' worked example."""
    logprobs = torch.tensor([[0.95, 0.3, 0.99, 0.6, 0.97, 0.2, 0.92]]).log()
    mask = torch.ones(1, 7, dtype=torch.bool)
    starts = probability(mask, logprobs, below=0.9, every=2)
    actions = MacroActions.from_starts(starts, mask)
    assert actions.ids.tolist() == [[0, 1, 1, 1, 1, 2, 2]]
    return actions, logprobs, unlikely_tokens(actions, logprobs, limit=0.9)


@pytest.mark.parametrize("limit", [{"microbatch_size": 1}, {"microbatch_tokens": 4}])
def test_three_samples_in_two_interleaved_stages_count_three_times(limit):
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    rows = [torch.arange(3.0) + start for start in range(3)]
    grid = torch.stack(rows) * mask / 10
    experience = Experience(
        prompts=PROMPTS,
        responses=RESPONSES,
        actions=MacroActions.from_starts(mask, mask),
        old_logprobs=-grid,
        ref_logprobs=-2 * grid,
        old_values=grid,
        advantages=1 - grid,
        returns=3 * grid,
    )
    found = []
    for stages, ppo in ((1, {"microbatch_size": 3}), (2, limit)):
        config = Config.model_validate({"ppo": ppo | {"kl_loss_coef": 0.1, "entropy_coef": 0.1}})
        parts = make_microbatches(experience, torch.arange(3), config, mesh(stages))
        assert len(parts) == (1 if stages == 1 else 4)
        losses = []
        for part in parts:
            logprobs = logprobs_of(part.batch)
            policy = policy_objective(torch.stack([logprobs, -logprobs]), part, config=config)
            critic = critic_objective(logprobs, part, config=config)
            losses.append((policy.loss_sum, policy.count, critic.loss_sum, critic.count))
        found.append(total(losses))
    assert found[1] == pytest.approx(found[0])
    assert found[0][1] == found[0][3] == 6


@pytest.mark.parametrize(
    ("objective", "surrogate"),
    [
        # Of log-ratios .5 and -.1, clipped to 1 - .2 and 1 + .3, and advantages 1 and -2.
        ("clip", -(1.3 - 2 * math.exp(-0.1)) / 2),
        ("cispo", -(1.3 * -0.5 - 2 * math.exp(-0.1) * -1.1) / 2),
        ("pg", -(-0.5 - 2 * -1.1) / 2),
    ],
)
def test_the_configuration_chooses_the_objective(objective, surrogate):
    mask = torch.tensor([[True, True]])
    microbatch = PpoMicrobatch(
        batch=None,
        actions=MacroActions.from_starts(mask, mask),
        old_logprobs=torch.tensor([[-1.0, -1.0]]),
        ref_logprobs=torch.zeros(1, 2),
        old_values=None,
        advantages=torch.tensor([[1.0, -2.0]]),
        returns=None,
    )
    ppo = {"objective": objective, "clip_range_high": 0.3, "estimator": "rloo"}
    output = torch.tensor([[[-0.5, -1.1]], [[0.0, 0.0]]])
    config = Config.model_validate({"ppo": ppo})
    loss = policy_objective(output, microbatch, config=config)
    assert (loss.loss_sum / loss.count).item() == pytest.approx(surrogate)


def test_pairs_stay_together_and_fillers_of_a_pipeline_are_pairs_too():
    """Six samples, three pairs; an interleaved pipeline of two stages wants four microbatches."""
    mask = torch.ones(6, 1, dtype=torch.bool)
    grid = torch.arange(6.0)[:, None]
    experience = Experience(
        prompts=[[1] * n for n in (9, 1, 2, 2, 5, 1)],
        responses=[[5]] * 6,
        actions=MacroActions.from_starts(mask, mask),
        old_logprobs=grid - 6,
        ref_logprobs=grid,
        old_values=None,
        advantages=grid.square(),
        returns=None,
    )
    pairs = {"objective": "p3o", "estimator": "dr_grpo", "aggregation": "seq_mean_token_sum"}
    config = Config.model_validate({"ppo": pairs | {"microbatch_size": 2}})
    found = []
    for stages in (1, 2):
        parts = make_microbatches(experience, torch.arange(6), config, mesh(stages))
        rows = [part.old_logprobs[:, 0].tolist() for part in parts]
        assert rows[-3:] == [[-4, -3], [-2, -1], [-6, -5]]
        losses = []
        for part in parts:
            output = torch.stack([0.9 * part.old_logprobs, part.old_logprobs])
            losses.append(policy_objective(output, part, config=config))
        found.append(total([(loss.loss_sum, loss.count) for loss in losses]))
    assert found[1] == pytest.approx(found[0])
    assert found[0][1] == 6
    # A pair's l are 0.1 (6 - i): D = 0.1, so q = A_1 - A_2 - 0.005 and w = exp(l_1 + l_2).
    expected = sum(
        -(i**2 - (i + 1) ** 2 - 0.05 * 0.1) * math.exp(0.1 * (11 - 2 * i)) * 0.1 for i in (0, 2, 4)
    )
    assert found[0][0] == pytest.approx(expected, rel=1e-5)
