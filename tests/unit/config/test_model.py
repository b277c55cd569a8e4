"""Shapes that follow from others, and shapes that do not fit."""

import pytest
from pydantic import ValidationError

from marlhf_mega.config.model import ModelConfig


def test_heads_share_the_width_and_keys_unless_told_otherwise():
    plain = ModelConfig(hidden_size=96, num_attention_heads=6)
    assert (plain.kv_channels, plain.query_groups) == (16, 6)
    own = ModelConfig(hidden_size=97, num_attention_heads=6, num_query_groups=2, head_dim=20)
    assert (own.kv_channels, own.query_groups) == (20, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads": 6, "hidden_size": 96, "num_query_groups": 4},
            r"model\.num_query_groups=4: must divide model\.num_attention_heads=6\.",
        ),
        (
            {"num_attention_heads": 6, "hidden_size": 97},
            r"model\.num_attention_heads=6: must divide model\.hidden_size=97 unless",
        ),
        (
            {"num_experts": 4, "experts_per_token": 5},
            r"model\.experts_per_token=5: cannot exceed model\.num_experts=4\.",
        ),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)
