"""The steps of a run, and what one pass over the data does not reach."""

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.train.steps import num_steps, optimizer_steps


@pytest.mark.parametrize(
    ("run", "num_examples", "expected", "said"),
    [
        ({}, 8, 2, None),
        (
            {},
            7,
            1,
            "7 training examples at sft.batch_size=4: 3 are left out of one pass (steps: 1)",
        ),
        (
            {},
            3,
            1,
            "3 training examples at sft.batch_size=4: one pass is one step, in which some are used "
            "twice or more",
        ),
        ({"steps": 5}, 7, 5, None),
        ({"epochs": 4}, 7, 7, None),
        (
            {"epochs": 3},
            7,
            5,
            "7 training examples at sft.batch_size=4: 1 are left out of 3 passes (steps: 5)",
        ),
    ],
)
def test_what_the_passes_leave_out_is_said(caplog, run, num_examples, expected, said):
    config = Config.model_validate({"run": run})
    with caplog.at_level("INFO", logger="marlhf_mega"):
        assert num_steps(config, num_examples, 4, key="sft.batch_size") == expected
    assert [message.startswith(said) for message in caplog.messages] == ([True] if said else [])


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
