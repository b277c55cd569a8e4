"""Rewards of answers that can be checked, on texts written by hand."""

import pytest

from marlhf_mega.rewards.rule import RuleReward
from marlhf_mega.rewards.verify import abstention, exact_match, final_number, pattern

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72 in all.\n#### 72"


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (GSM8K, GSM8K, 1),
        ("So 48 + 24 = 72.", GSM8K, 1),
        ("72 is what I say, not 73", GSM8K, 0),
        ("It is 5.\n#### 72\n", 72, 1),
        ("#### 5\nIt is 72.\n#### 72", "72", 1),
        ("#### I say nothing after all of 72", "3", 0),
        ("That makes $1,234.50 a year.", "1234.5", 1),
        ("1,2", 2, 1),
        ("1,0000", 0, 1),
        ("minus: -3", -3, 1),
        ("between 3-4", 4, 1),
        ("x4", 4, 0),
        (r"Therefore \boxed{\frac{1}{2}} of 7", 0.5, 1),
        (r"\boxed{3} and later \boxed{17 \text{ km}} on page 2", "17", 1),
        ("a half, .5", "1/2", 1),
        ("1/0", 1, 0),
        ("no number", 1, 0),
        ("", 1, 0),
        ("9" * 5000, 1, 0),
    ],
)
def test_the_final_number(response, answer, score):
    assert final_number("", response, answer) == score


def test_a_row_without_a_number_is_an_error():
    with pytest.raises(ValueError, match=r"^answer='none': must have a number\. Fix the data row"):
        final_number("", "5", "none")


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("Paris", "Paris", 1),
        ("  paris.\n", "Paris", 1),
        ("New\n york", ["NYC", "New York"], 1),
        ("It is Paris", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_an_exact_match(response, answer, score):
    assert exact_match("", response, answer) == score


def test_a_pattern():
    assert pattern("", "<think>a</think> b", r"^<think>.*</think>") == 1
    assert pattern("", "b", r"^<think>.*</think>") == 0


@pytest.mark.parametrize(
    ("response", "answer", "fields", "score"),
    [
        ("The capital is Paris.", "Paris", {}, 1),
        ("The capital is Parisian.", "Paris", {}, -1),
        ("I don't know.", "Paris", {}, 0),
        ("I\u2019m not sure, maybe Paris", "Paris", {"abstain_reward": 0.3}, 0.3),
        ("Sorry, I cannot answer that.", 7, {"abstain_reward": 0.3}, 0.3),
        ("It is 8.", 7, {"confidence": 0.25}, -0.25),
        ("It is 7.", 7, {"confidence": 0.25}, 1),
        ("Then I did not know the way to Paris", "Rome", {}, -1),
    ],
)
def test_abstaining_is_worth_more_than_a_wrong_answer(response, answer, fields, score):
    assert abstention("", response, answer, **fields) == score


def test_they_are_sources_that_read_the_fields_of_the_row():
    source = RuleReward("marlhf_mega.rewards.verify:final_number")
    rows = [{"prompt": "How many?", "answer": GSM8K, "id": 3}, {"prompt": "And?", "answer": "x"}]
    found = source.score(["How many?", "And?"], ["72", "72"], rows)
    source.close()
    assert found.scores.tolist() == [1, 0]
    assert found.valid.tolist() == [True, False]
    (reason,) = found.errors
    assert reason.endswith("raised ValueError: answer='x': must have a number. Fix the data row.")
