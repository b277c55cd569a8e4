"""Which samples are shown, and what their macro actions carry, by hand."""

import re

import pytest

from marlhf_mega.report.samples import (
    MAX_SPANS,
    Scales,
    first_and_last,
    rest,
    signed,
    spans,
    strips,
)


def sample(step, prompt):
    return {"step": step, "prompt": prompt, "tokens": ["a"], "actions": []}


def segmented(tokens, *actions, end=None):
    """A sample whose actions are (start, length, advantage, value, kl)."""
    names = ("start", "length", "advantage", "value", "kl")
    return {
        "tokens": tokens,
        "end": end,
        "actions": [dict(zip(names, action, strict=True)) for action in actions],
    }


FRUIT = segmented(
    ["An", " apple", ",", " yes", ""],
    (0, 3, 0.5, 1.25, 0.0625),
    (3, 2, -2.0, -0.5, -0.25),
    end="</s>",
)


def test_the_first_and_the_last_step_are_shown_common_prompts_side_by_side():
    samples = [sample(1, p) for p in "xby"] + [sample(5, "z")] + [sample(9, p) for p in "yqb"]
    shown = first_and_last(samples)
    assert {step: [s["prompt"] for s in some] for step, some in shown.items()} == {
        1: ["b", "y", "x"],
        9: ["b", "y", "q"],
    }


def test_one_step_is_shown_once_and_of_many_samples_a_few():
    assert first_and_last([]) == {}
    assert {step: len(some) for step, some in first_and_last([sample(3, "p")] * 9).items()} == {
        3: 4
    }


def test_a_macro_action_has_its_tokens_and_numbers():
    first, second = spans(FRUIT, Scales.of([FRUIT]))
    assert (first.tokens, first.end, first.is_gain) == (["An", " apple", ","], None, True)
    assert (second.tokens, second.end, second.is_gain) == ([" yes", ""], "</s>", False)
    assert first.title == "macro action 1 of 2, 3 tokens"
    assert first.numbers == [("advantage", "+0.5"), ("value", "+1.25"), ("kl", "+0.0625")]
    assert second.numbers == [
        ("advantage", "\N{MINUS SIGN}2"),
        ("value", "\N{MINUS SIGN}0.5"),
        ("kl", "\N{MINUS SIGN}0.25"),
    ]
    assert first.strength < second.strength == 100


def test_all_samples_share_one_scale():
    other = segmented(["x"], (0, 1, 8.0, 0.0, 0.0))
    scales = Scales.of([FRUIT, other])
    assert scales.largest == {"advantage": 8.0, "value": 1.25, "kl": 0.25}
    assert scales.num_actions == 3
    assert [span.strength for span in spans(other, scales)] == [100]


def test_a_strip_has_a_bar_over_the_tokens_of_each_action():
    advantage, value, _ = strips(FRUIT, Scales.of([FRUIT]))
    assert (advantage.label, advantage.top, value.top) == (
        "advantage",
        "\N{PLUS-MINUS SIGN}2",
        "\N{PLUS-MINUS SIGN}1.2",
    )

    def corners(path):
        return [float(x) for x in re.findall(r"[\d.]+", path)]

    # Three of five tokens, 0.5 of 2 above the middle of 20; then two tokens, all the way down.
    left, floor, top, right, closing = corners(advantage.gains)
    assert (floor, top, closing) == (10, 7.5, 10)
    assert (left, right) == pytest.approx((0.3, 59.7))
    left, _, bottom, right, _ = corners(advantage.losses)
    assert (left, bottom, right) == pytest.approx((60.3, 20, 99.7))


def test_what_is_zero_throughout_has_no_strip():
    start = segmented(["a", "b"], (0, 1, 1.0, 0.5, 0.0), (1, 1, -1.0, 0.5, 0.0))
    assert [strip.label for strip in strips(start, Scales.of([start]))] == ["advantage", "value"]


def test_a_sample_that_was_not_segmented_is_all_rest():
    plain = {"tokens": ["An", " apple"], "actions": []}
    assert (spans(plain, Scales.of([plain])), strips(plain, Scales.of([plain]))) == ([], [])
    assert rest(plain) == "An apple"
    # Runs of earlier versions have no such field.
    assert rest({"tokens": ["An", " apple"]}) == "An apple"


def test_of_many_actions_the_first_are_spans():
    count = MAX_SPANS + 2
    long = segmented(["t"] * count, *[(k, 1, 1.0, 0.0, 0.0) for k in range(count)], end="</s>")
    shown = spans(long, Scales.of([long]))
    assert len(shown) == MAX_SPANS
    assert shown[-1].end is None
    assert rest(long) == "tt"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "+0.123"), (-12.0, "\N{MINUS SIGN}12"), (0.0, "+0"), (None, "-"), (1e-9, "+1e-9")],
)
def test_numbers_have_their_sign(value, text):
    assert signed(value) == text
