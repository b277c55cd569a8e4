r"""Rewards for answers that can be checked: final numbers, texts, patterns, and abstention.

Each is a `reward.source` of its own, `marlhf_mega.rewards.verify:final_number` for example. Its
parameters are fields of the data row.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/0*[1-9]\d*)?"
)
_LONGEST_NUMBER = 100
"""Characters; a longer one is never right."""
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\d?frac\s*\{(-?\d+)\}\s*\{(\d+)\}")
_ABSTENTION = re.compile(
    r"\bi (?:do not|don['\u2019]t) know\b|\bi(?: am|['\u2019]m) (?:not (?:sure|certain)|unsure)\b|"
    r"\b(?:cannot|can['\u2019]t) (?:answer|say|tell)\b",
    re.IGNORECASE,
)


def final_number(prompt: str, response: str, answer: str | float) -> float:
    r"""Return 1 if a response ends with the right number, else 0: GSM8K and the like.

    The number of a text is the one after its last `####`, else that of its last `\boxed{}`, else
    its last one. `1,000`, `1000.0` and `2000/2` are equal.

    Args:
        prompt: not used.
        response: the solution.
        answer: the data row's number, or a solution that ends with it.

    Raises:
        ValueError: the answer has no number.
    """
    expected = _final_number(str(answer))
    if expected is None:
        raise ValueError(f"answer={answer!r:.60}: must have a number. Fix the data row.")
    return float(_final_number(response) == expected)


def exact_match(prompt: str, response: str, answer: str | Sequence[str]) -> float:
    """Return 1 if a response is an answer, but for case, blanks and a final full stop; else 0.

    Args:
        prompt: not used.
        response: text to compare.
        answer: the data row's right answer, or several.
    """
    answers = [answer] if isinstance(answer, str) else answer
    return float(_plain(response) in map(_plain, answers))


def pattern(prompt: str, response: str, pattern: str) -> float:
    """Return 1 if a regular expression of the data row is found in a response, else 0."""
    return float(re.search(pattern, response) is not None)


def abstention(
    prompt: str,
    response: str,
    answer: str | float,
    abstain_reward: float = 0.0,
    confidence: float = 1.0,
) -> float:
    """Return 1 for a right answer, less for abstaining, and -confidence for a wrong one.

    SALU describes a penalty for wrong answers that is scaled by confidence, and a reward for
    abstaining; its formula is not known to us, nor where the confidence comes from.

    Args:
        prompt: not used.
        response: the answer, or a sentence such as "I don't know".
        answer: a number is compared as by `final_number`; a text must occur.
        abstain_reward: reward of abstaining.
        confidence: how sure a model is of its answer to this prompt, 0 to 1; with 0 a wrong answer
            costs nothing.
    """
    if _ABSTENTION.search(response):
        return float(abstain_reward)
    if _final_number(str(answer)) is None:
        words = rf"(?<!\w){re.escape(_plain(str(answer)))}(?!\w)"
        is_right = re.search(words, _plain(response)) is not None
    else:
        is_right = final_number(prompt, response, answer) == 1
    return 1.0 if is_right else -float(confidence)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _final_number(text: str) -> Fraction | None:
    """Return the number that a text ends with, None without one."""
    _, mark, after = text.rpartition("####")
    if mark:
        text = after
    elif boxed := _BOXED.findall(text):
        text = boxed[-1]
    numbers: list[str] = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text))
    if not numbers or len(numbers[-1]) > _LONGEST_NUMBER:
        return None
    top, _, bottom = numbers[-1].replace(",", "").partition("/")
    return Fraction(top) / Fraction(bottom or 1)
