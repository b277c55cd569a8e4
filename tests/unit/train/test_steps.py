"""The steps of a run, and what one pass over the data does not reach."""

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.train.steps import num_steps


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
