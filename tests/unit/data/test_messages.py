"""Preferences whose answers are messages, by hand."""

import pytest

from marlhf_mega.data.messages import with_text_answers

CHAT = [{"role": "user", "content": "hi"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": CHAT, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"prompt": "hi", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
        {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    ],
)
def test_answers_may_be_messages_with_or_without_those_they_answer(row):
    wanted = {"prompt": CHAT, "chosen": "good", "rejected": "bad"}
    assert with_text_answers(row, where="f:1") == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, GOOD, *CHAT, BAD]},
        {"prompt": CHAT, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, *CHAT, BAD]},
    ],
)
def test_answers_to_other_messages_are_refused(row):
    with pytest.raises(ValueError, match="f:1: prompt: must be the messages that chosen and rej"):
        with_text_answers(row, where="f:1")
