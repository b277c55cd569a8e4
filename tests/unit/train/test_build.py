"""How many optimizer steps the schedules are made for, by hand."""

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.train.build import optimizer_steps


@pytest.mark.parametrize(("resting", "policy"), [(0, 60), (4, 36), (20, 0)])
def test_the_policy_takes_no_steps_while_the_critic_warms_up(resting, policy):
    config = Config.model_validate(
        {
            "rollout": {"batch_size": 24},
            "ppo": {"epochs": 2, "minibatch_size": 8, "critic_only_steps": resting},
        }
    )
    # 10 PPO steps of 2 epochs of 3 minibatches.
    assert optimizer_steps(config, 10) == {"policy": policy, "critic": 60}
