import pytest

from marlhf_mega.rewards.slot_coverage import parse_slots, slot_coverage

PROMPT = "name[The Eagle], food[Fast food], customer rating[1 out of 5], familyFriendly[no]"


def test_slots_are_read_from_the_meaning_representation() -> None:
    assert parse_slots(PROMPT) == {
        "name": "The Eagle",
        "food": "Fast food",
        "customer rating": "1 out of 5",
        "familyFriendly": "no",
    }


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("The Eagle serves fast food.", 0.5),
        ("the eagle: FAST FOOD, not for kids, rated 1 out of 5.", 1.0),
        ("The Eagle welcomes families.", 0.5),
        ("Eagle has food, rated one out of five, for adults.", 0.0),
    ],
)
def test_coverage_counts_literal_mentions(response: str, expected: float) -> None:
    assert slot_coverage(PROMPT, response) == expected


def test_given_slots_replace_those_of_the_prompt() -> None:
    assert slot_coverage("", "near Ranch", {"near": "Ranch"}, id="ignored") == 1.0


def test_a_prompt_without_slots_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt='hello': must be a meaning representation"):
        slot_coverage("hello", "text")
