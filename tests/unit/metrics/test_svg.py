import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.metrics.svg import line_chart, stacked_chart, ticks

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ET.fromstring(svg).iter("title")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 11.0, [0.0, 5.0, 10.0]),
        (9e-6, 1.1e-5, [9e-6, 9.5e-6, 1e-5, 1.05e-5, 1.1e-5]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected, rel=1e-12)


def test_a_line_names_each_step_and_value_and_rises_where_the_values_rise():
    svg = line_chart([(0, 1.0), (10, 2.0), (20, 4.0)], label="policy/kl")
    assert titles(svg) == ["step 0: 1", "step 10: 2", "step 20: 4"]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    # Drawn downwards: the second step of the curve is twice the first.
    assert heights[1] - heights[2] == pytest.approx(2 * (heights[0] - heights[1]), abs=0.2)


def test_a_long_curve_is_drawn_as_means_of_neighbours():
    svg = line_chart([(step, float(step)) for step in range(1000)], label="x")
    shown = titles(svg)
    assert len(shown) == 143  # buckets of 7
    assert shown[0] == "step 3: 3"


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_any_finite_values_give_well_formed_coordinates(values):
    svg = line_chart(list(enumerate(values)), label="<&>\"'")
    ET.fromstring(svg)
    assert "nan" not in svg
    numbers = [float(y) for y in re.findall(r'c[xy]="(-?[\d.]+)"', svg)]
    assert all(math.isfinite(x) and -1 <= x <= 301 for x in numbers)


def test_stacked_bars_reach_the_sum_of_the_phases():
    svg = stacked_chart({"rollout": [1.0, 2.0], "<update>": [3.0, 0.0]}, [0, 1])
    assert titles(svg) == [
        "step 0: rollout 1 s of 4 s",
        "step 1: rollout 2 s of 2 s",
        "step 0: <update> 3 s of 4 s",
        "step 1: <update> 0 s of 2 s",
    ]
    rollout, _, update, _ = [
        (float(r.get("y")), float(r.get("height"))) for r in ET.fromstring(svg).iter("rect")
    ]
    assert update[0] + update[1] == pytest.approx(rollout[0], abs=0.02)
    assert update[1] == pytest.approx(3 * rollout[1], abs=0.05)


def test_phases_that_took_no_time_can_be_drawn():
    ET.fromstring(stacked_chart({"rollout": [0.0]}, [0]))
