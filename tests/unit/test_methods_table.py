"""The table of methods names every choice, and functions whose docstrings cite the papers."""

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest

from marlhf_mega.algorithm.choices import (
    Combination,
    Estimator,
    Objective,
    PreferenceLoss,
    Shaping,
)
from marlhf_mega.config.schema import Config

PAGE = Path(__file__).parents[2] / "marlhf_mega/algorithm/README.md"
ROW = re.compile(r"^\| .* \| `([\w.]+)(?:=(\w+))?` \| `(\w+)\.(\w+)` \| ([\d.]+) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text())


def test_every_row_is_read():
    assert len(ROWS) == PAGE.read_text().count("\n| ") - 1


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("ppo.estimator", Estimator),
        ("ppo.objective", Objective),
        ("reward.combine", get_args(Combination)[1:]),
        ("reward.shaping", Shaping),
        ("preference.loss", PreferenceLoss),
    ],
)
def test_every_choice_has_a_row(key, choices):
    assert [value for name, value, *_ in ROWS if name == key] == list(get_args(choices) or choices)


@pytest.mark.parametrize(("key", "value", "module", "function", "paper"), ROWS)
def test_a_row_is_true(key, value, module, function, paper):
    section, name = key.split(".")
    if value:
        Config.model_validate({section: {name: value}})
    assert name in type(getattr(Config(), section)).model_fields
    found = importlib.import_module(f"marlhf_mega.algorithm.{module}")
    assert f"arXiv {paper}" in re.sub(
        r"\s+", " ", f"{found.__doc__} {getattr(found, function).__doc__}"
    )
