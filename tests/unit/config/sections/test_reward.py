"""Refusals of reward sources."""

import pytest
from pydantic import ValidationError

from marlhf_mega.config.schema import Config


@pytest.mark.parametrize(
    "term",
    [{"source": "a:b"}, {"source": "http://host/x"}, {"source": "rm", "template": "{response}"}],
)
def test_only_a_model_rewards_tokens(term):
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"reward": {"dense": term | {"kind": "sentence"}}})
    assert (
        f"reward.dense={term['source']}: must be a model, without a template, since it rewards "
        "tokens. Give the directory of one." in str(caught.value)
    )
