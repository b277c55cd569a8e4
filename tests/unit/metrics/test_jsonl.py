"""JSON Lines that survive kills, resumes and values that JSON cannot hold."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.metrics.jsonl import JsonLines, read_lines


def write(path, *steps, first_step=0):
    lines = JsonLines(path, first_step=first_step)
    for step in steps:
        lines.write({"step": step, "from": first_step})
    lines.close()


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    write(path, 0, 1, 2, 3)
    write(path, 2, 3, first_step=2)
    found = [(line["step"], line["from"]) for line in read_lines(path)]
    assert found == [(0, 0), (1, 0), (2, 2), (3, 2)]


def test_numbers_are_added_to_those_of_a_step_and_more_can_be_written(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", first_step=0)
    lines.write({"step": 1, "seconds": 2.0})
    lines.write({"step": 2, "loss": 0.1, "seconds": 0.5})
    lines.add(2, {"seconds": 1.25, "export": 3.0})
    lines.add(7, {"seconds": 9.0})
    lines.write({"step": 3})
    lines.close()
    assert list(read_lines(lines.path)) == [
        {"step": 1, "seconds": 2.0},
        {"step": 2, "loss": 0.1, "seconds": 1.75, "export": 3.0},
        {"step": 3},
    ]


@given(st.integers(0, 40))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write(path, 0, 1, 2)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    whole = path.read_text().count("\n")
    assert [line["step"] for line in read_lines(path)] == list(range(whole))
    write(path, whole, first_step=whole)
    assert [line["step"] for line in read_lines(path)] == list(range(whole + 1))


def test_what_is_not_finite_becomes_null_at_any_depth(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = JsonLines(path, first_step=0)
    lines.write({"step": 0, "a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": "nan"})
    lines.close()
    text = path.read_text()
    assert json.loads(text) == {"step": 0, "a": None, "b": [1.5, None, {"c": None}], "d": "nan"}


def test_no_file_has_no_lines(tmp_path):
    assert list(read_lines(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", ":2: must be JSON; Expecting property name"),
        ("[3]", ":2: must be an object with an integer step"),
        ('{"step": 1.5}', ":2: must be an object with an integer step"),
        ("{}", ":2: must be an object with an integer step"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=".") as caught:
        list(read_lines(path))
    assert str(caught.value).startswith(f"{path}{message}")
