"""Pairs beside others of their user."""

import re

import pytest

from marlhf_mega.data.contexts import InContext
from marlhf_mega.data.datasets import PreferencePair


def pairs(users):
    return [
        PreferencePair(prompt_ids=[i], chosen_ids=[1], rejected_ids=[2], margin=0.0, user=user)
        for i, user in enumerate(users)
    ]


def test_a_context_is_of_other_pairs_of_the_user():
    users = "abacaabbcab"
    found = InContext(pairs(users), size=3, seed=0, key="data.train_path")
    assert len(found) == len(users)
    for number, pair in enumerate(found):
        own = [other.number for other in pair.context]
        others = [i for i, user in enumerate(users) if user == users[number] and i != number]
        assert pair.prompt_ids == [number]
        assert pair.number == number
        assert len(own) == min(3, len(others))
        assert set(own) <= set(others)
        assert own == [other.prompt_ids[0] for other in pair.context] == sorted(own)
    assert found[-1] == found[10] == found[8:][2]
    again = InContext(pairs(users), size=3, seed=0, key="data.train_path")
    assert list(again) == list(found)
    assert list(InContext(pairs(users), size=3, seed=1, key="data.train_path")) != list(found)
    drawn = {
        other.number
        for seed in range(20)
        for other in InContext(pairs("a" * 5), size=2, seed=seed, key="")[2].context
    }
    assert drawn == {0, 1, 3, 4}


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (
            ["a", "", "a"],
            "data.train_path: pairs for reward_model.latent_size must say whose preference they "
            "are; 1 of 3 do not. Add the field user, or say which field it is: "
            "data.fields.user=FIELD",
        ),
        (
            ["a", "b", "a"],
            "data.train_path: users must have two pairs or more for reward_model.latent_size, "
            "which reads their other ones; b has one. Leave that pair out, or add others.",
        ),
    ],
)
def test_users_must_be_known_and_have_other_pairs(users, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        InContext(pairs(users), size=3, seed=0, key="data.train_path")
