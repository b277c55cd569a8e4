"""What any section of the configuration reads and refuses."""

from typing import Literal

import pytest
from pydantic import ValidationError, field_validator

from marlhf_mega.config.section import Section, spell_off


class Example(Section):
    ratio: float = 0.5
    limit: int | None = 3
    sizes: tuple[int, ...] = (1, 2)
    mode: Literal["none", "some"] = "some"
    fp8: Literal["off", "on"] = "off"
    flag: bool = False

    _off = field_validator("fp8", mode="before")(spell_off)


@pytest.mark.parametrize("word", ["none", "None", None])
def test_a_key_that_may_be_null_takes_the_word_for_it(word):
    assert Example.model_validate({"limit": word}).limit is None


def test_the_word_stays_a_word_elsewhere():
    assert Example.model_validate({"mode": "none"}).mode == "none"


@pytest.mark.parametrize("values", [{"ratio": True}, {"limit": False}, {"sizes": [1, True]}])
def test_true_and_false_are_no_numbers(values):
    with pytest.raises(ValidationError, match="input should be a number, not true or false"):
        Example.model_validate(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_numbers_are_finite(value):
    with pytest.raises(ValidationError, match="finite"):
        Example.model_validate({"ratio": value})


def test_an_unquoted_off_is_the_word():
    assert Example.model_validate({"fp8": False}).fp8 == "off"
    assert Example.model_validate({"flag": False}).flag is False


def test_keys_are_known_and_never_change():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Example.model_validate({"other": 1})
    with pytest.raises(ValidationError, match="frozen"):
        Example().ratio = 1.0
