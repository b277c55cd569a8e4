"""What ends a response, token by token."""

import pytest

from marlhf_mega.rollout.stops import StopRule

BYTES = [b"", b"Us", b"er", b"er:", b"\n", b"\nU", b"s", b"x:User"]


@pytest.mark.parametrize(
    ("tokens", "met"),
    [
        ([0], False),
        ([4, 1, 2], False),
        ([4, 1, 3], True),
        ([5, 6, 0, 3], True),
        ([5, 6, 3, 0], False),  # it was over one token before
        ([7], False),
        ([1, 8], True),
        ([9], True),
    ],
)
def test_a_text_ends_a_response_with_the_token_that_completes_it(tokens, met):
    rule = StopRule(frozenset({8, 9}), (b"\nUser:",), [*BYTES, b"", b""])
    assert rule.is_met(tokens) is met
    assert not StopRule().is_met(tokens)
