"""Rendered texts by hand."""

import pytest

from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.config.sections.reward import RewardTerm
from marlhf_mega.rewards.template import fill_template

SALMON = "{response}\n\nInstruction: {prompt}\n{principles}\n{{The quality}} is"


def test_a_list_of_principles_has_a_line_for_each():
    judge = RewardTerm(source="rm", template=SALMON)
    row = {"prompt": "Hi {you}", "response": "old", "principles": ["- be brief", "- be kind"]}
    texts, errors = fill_template(judge, ["Hello."], [row])
    assert texts == ["Hello.\n\nInstruction: Hi {you}\n- be brief\n- be kind\n{The quality} is"]
    assert errors == []


def test_a_row_without_a_field_has_no_text():
    judge = RewardTerm(source="rm", template="{response} {principle} {weight}?")
    rows = [{"principle": "short", "weight": 0.5}, {"principle": None, "weight": 1}]
    texts, errors = fill_template(judge, ["a", "b"], rows)
    assert texts == ["a short 0.5?", None]
    assert errors == ["the data row has no field principle for the template"]


@pytest.mark.parametrize(
    ("term", "line"),
    [
        (
            "{source: rm, answers: [Sure, Never]}",
            "reward.source=rm: answers follow a template, which is not set. Set it, or remove "
            "answers.",
        ),
        (
            "{source: 'a:b', template: '{response}'}",
            "reward.source=a:b: a template is for models; a function or server gets prompt, "
            "response and the fields of the row. Remove it.",
        ),
        (
            "{source: rm, template: '{prompt}'}",
            "reward.source=rm: template must name fields in single braces, among them {response}; "
            "it is '{prompt}'. Write other braces twice.",
        ),
        (
            "{source: rm, template: '{response} {'}",
            "reward.source=rm: template must name fields in single braces, among them {response}; "
            "it is '{response} {'. Write other braces twice.",
        ),
        (
            "{source: rm, template: '{response} {row.id}'}",
            "reward.source=rm: template must name fields in single braces, among them {response}; "
            "it is '{response} {row.id}'. Write other braces twice.",
        ),
        (
            "{source: rm, template: '{response}', answers: [Sure, Sure]}",
            "reward.source=rm: answers must be two different texts; they are [Sure, Sure]. Change "
            "them.",
        ),
        (
            "{source: rm, template: '{response}', answers: [Yes, No]}",
            "reward.source.answers: must be texts; YAML reads Yes and No as true and false. Quote "
            "them.",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(term, line):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"reward.source={term}"])
    assert line in str(caught.value)
