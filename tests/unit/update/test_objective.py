"""The policy's objective from its three terms, by hand; rows that only fill up count nowhere."""

from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import OfflineExample
from marlhf_mega.experience.types import Experience
from marlhf_mega.train import offline
from marlhf_mega.update.ppo import (
    PpoMicrobatch,
    critic_objective,
    make_microbatches,
    policy_objective,
)
from marlhf_mega.update.skipped import keep_skipped

PROMPTS, RESPONSES = [[1], [2, 3], [4]], [[5, 6], [7], [8, 9, 6]]


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


def mesh(num_stages):
    """A rank of an interleaved pipeline, which takes a multiple of its stages."""
    return SimpleNamespace(
        pp_size=num_stages,
        num_chunks=2 if num_stages > 1 else 1,
        ep_size=1,
        sequence_multiple=1,
        context_multiple=1,
        device=torch.device("cpu"),
    )


def logprobs_of(batch):
    """What a model might say, a function of each token alone."""
    return batch.to_grid(-0.1 * batch.response_tokens.float())


def total(losses):
    return [sum(float(x) for x in xs) for xs in zip(*losses, strict=True)]


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


@pytest.mark.parametrize("algorithm", ["a_lol", "a_lol_kl", "nll"])
def test_three_responses_in_two_interleaved_stages_count_three_times(algorithm):
    chosen = [
        offline.ValuedExample(
            example=OfflineExample(prompt_ids=p, response_ids=r, reward=reward),
            value=0.25,
            ref_logprobs=-0.2 * torch.tensor(r),
        )
        for p, r, reward in zip(PROMPTS, RESPONSES, (0.5, 1.0, 0.75), strict=True)
    ]
    found = []
    for stages, size in ((1, 3), (2, 1)):
        settings = {"algorithm": algorithm, "microbatch_size": size, "kl_coef": 0.1}
        config = Config.model_validate({"offline": settings})
        parts = offline._cut(chosen, config, mesh(stages))
        assert len(parts) == (1 if stages == 1 else 4)
        losses = []
        for part in parts:
            logprobs = logprobs_of(part.batch)
            loss = offline._loss(torch.stack([logprobs, -logprobs]), part, config)
            losses.append((loss.loss_sum, loss.count, loss.metrics["advantage"][0]))
        found.append(total(losses))
    assert found[1] == pytest.approx(found[0])
    assert found[0][1:] == pytest.approx([3, 0.25 + 0.75 + 0.5])


def test_too_many_skipped_steps_of_a_reward_model_name_its_learning_rate(tmp_path):
    config = Config.model_validate({"run": {"dir": tmp_path, "max_skipped_steps": 0}})
    state = SimpleNamespace(num_skipped=1)
    rank = SimpleNamespace(rank=0, is_replica_leader=False)
    with pytest.raises(RuntimeError, match=r"gradients of reward .* or lower reward_model\.lr\.$"):
        keep_skipped(state, {}, config, rank, role="reward", step=0)
